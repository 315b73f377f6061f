"""gptmoe.model.expert_choice: against plain loops in float64; thresholds; what nobody took.

Letters: T tokens, D model width, E experts.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptmoe.model.expert_choice import ExpertChoiceRouter, acausal_routing, choose
from gptmoe.model.lsoftmax import margin_losses
from gptmoe.model.moe import MoE
from gptmoe.model.routing import Groups, Routing, Statistics
from gptmoe.model.spec import ModelSpec, RouterSpec

D_MODEL, NUM_EXPERTS, TOKENS = 5, 4, 24


def spec_of(**fields: object) -> RouterSpec:
    values = {"kind": "expert_choice", "capacity_factor": 1.0, **fields}
    return RouterSpec(**values)  # type: ignore[arg-type]


def make_router(num_experts: int = NUM_EXPERTS, **fields: object) -> ExpertChoiceRouter:
    router = ExpertChoiceRouter(D_MODEL, num_experts, spec_of(**fields)).double()
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(num_experts))
    return router


def make_tokens(count: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, D_MODEL, generator=generator, dtype=torch.float64)


def softmax(router: ExpertChoiceRouter, h_TD: Tensor) -> list[list[float]]:
    rows = []
    for h_D in h_TD:
        logits = [float(w_D @ h_D) for w_D in router.weight.detach()]
        total = sum(map(math.exp, logits))
        rows.append([math.exp(logit) / total for logit in logits])
    return rows


def rows_of(routing: Routing) -> dict[tuple[int, int], float]:
    """Weights by (token, expert)."""
    places = zip(routing.token_R.tolist(), routing.expert_R.tolist(), strict=True)
    return dict(zip(places, routing.weight_R.tolist(), strict=True))


def taken_by_loops(
    scores: list[list[float]], per_group: int, valid: list[bool], factor: float
) -> tuple[set[tuple[int, int]], list[list[float]]]:
    """(token, expert) pairs, and each expert's lowest score in each group with tokens."""
    taken, cutoffs = set(), []
    num_experts = len(scores[0])
    for start in range(0, len(scores), per_group):
        members = [t for t in range(start, start + per_group) if valid[t]]
        k = min(max(math.floor(len(members) * min(factor / num_experts, 1) + 0.5), 1), len(members))
        lowest = []
        for expert in range(num_experts):
            order = sorted(members, key=lambda t: (-scores[t][expert], t))
            taken |= {(t, expert) for t in order[:k]}
            lowest += [scores[t][expert] for t in order[k - 1 : k]]
        if members:
            cutoffs.append(lowest)
    return taken, cutoffs


@given(
    num_experts=st.integers(1, 6),
    num_groups=st.integers(1, 4),
    per_group=st.integers(1, 12),
    factor=st.sampled_from([0.1, 0.5, 1.0, 1.25, 2.0, 7.0, math.inf]),
    pad=st.integers(0, 3),
)
def test_experts_take_their_best_tokens_of_each_group(
    num_experts: int, num_groups: int, per_group: int, factor: float, pad: int
) -> None:
    router = make_router(num_experts, capacity_factor=factor)
    h_TD = make_tokens(num_groups * per_group)
    valid_T = torch.arange(len(h_TD)) % (pad + 1) == 0 if pad else None
    routing = router.route(h_TD, Groups(per_group, valid_T))

    scores = softmax(router, h_TD)
    valid = [True] * len(h_TD) if valid_T is None else valid_T.tolist()
    taken, cutoffs = taken_by_loops(scores, per_group, valid, factor)
    expected = {(t, e): scores[t][e] for t, e in taken}
    assert rows_of(routing) == pytest.approx(expected)

    counted = routing.statistics
    assert int(counted.tokens) == sum(valid)
    assert int(counted.dropped) == 0
    assert int(counted.unrouted) == sum(valid) - len({t for t, _ in taken})
    assert counted.load_E.tolist() == [sum(e == i for _, e in taken) for i in range(num_experts)]
    assert int(counted.groups) == len(cutoffs)
    sums = [sum(column) for column in zip(*cutoffs, strict=True)] or [0.0] * num_experts
    assert counted.cutoff_E.tolist() == pytest.approx(sums)


@pytest.mark.parametrize(("factor", "each"), [(1.0, 16), (2.0, 32), (0.5, 8)])
def test_the_load_is_exactly_even_in_training_however_skewed_the_scores(
    factor: float, each: int
) -> None:
    router = make_router(capacity_factor=factor)
    h_TD = make_tokens(64)
    h_TD[:, 0] = 20.0
    assert int(router.weight.argmax(0)[0]) == int((h_TD @ router.weight.t()).argmax(1).mode()[0])
    assert router.route(h_TD, Groups(64)).statistics.load_E.tolist() == [each] * NUM_EXPERTS


def test_of_equal_scores_the_earlier_token_is_taken() -> None:
    score_TE = torch.full((6, 2), 0.5)
    score_TE[4, 0] = 0.9
    take_TE, cutoff_GE = choose(score_TE, Groups(6), 1.0)
    assert take_TE[:, 0].tolist() == [True, True, False, False, True, False]
    assert take_TE[:, 1].tolist() == [True, True, True, False, False, False]
    assert cutoff_GE.tolist() == [[0.5, 0.5]]


def test_a_group_of_padding_takes_nothing_and_has_no_cut_off() -> None:
    router = make_router()
    valid_T = torch.tensor([False] * 8 + [True] * 8)
    routing = router.route(make_tokens(16), Groups(8, valid_T))
    assert min(routing.token_R.tolist()) >= 8
    assert int(routing.statistics.groups) == 1


def test_the_answers_of_several_experts_are_summed_by_their_scores() -> None:
    moe = make_moe(residual_depth=0, capacity_factor=2.0)
    h_TD = make_tokens()
    with torch.no_grad():
        out_TD, routing = moe(h_TD, Groups(TOKENS))
        naive_TD = torch.zeros_like(h_TD)
        for (token, expert), weight in rows_of(routing).items():
            naive_TD[token] += weight * answer(moe, expert, h_TD[token])
    assert len(rows_of(routing)) == 2 * TOKENS
    torch.testing.assert_close(out_TD, naive_TD)


def test_thresholds_average_the_cut_offs_once_a_step() -> None:
    router = make_router(threshold_decay=0.9)
    first, second = (router.route(make_tokens(n), Groups(8)).statistics for n in (16, 24))
    assert float(router.updates) == 0
    router.update(first)
    torch.testing.assert_close(router.threshold, first.cutoff_E / 2)
    router.update(second + Statistics.zero(NUM_EXPERTS))
    moment = 0.9 * 0.1 * (first.cutoff_E / 2) + 0.1 * (second.cutoff_E / 3)
    torch.testing.assert_close(router.threshold, moment / (1 - 0.9**2))
    assert int(router.updates) == 2


def test_a_step_without_groups_counts_and_moves_nothing() -> None:
    router = make_router()
    router.update(router.route(make_tokens(), Groups(8)).statistics)
    before = router.threshold.clone()
    router.update(Statistics.zero(NUM_EXPERTS))
    assert torch.equal(router.threshold, before)
    assert int(router.updates) == 2


def test_at_evaluation_each_token_is_decided_alone() -> None:
    router, h_TD = make_router(), make_tokens()
    router.update(router.route(h_TD, Groups(8)).statistics)  # a mean: no token's own score
    router.eval()
    together = rows_of(router.route(h_TD, Groups(TOKENS)))
    scores = softmax(router, h_TD)
    assert together == pytest.approx(
        {
            (t, e): score
            for t, row in enumerate(scores)
            for e, score in enumerate(row)
            if score >= float(router.threshold[e])
        }
    )
    for token in range(TOKENS):
        alone = rows_of(router.route(h_TD[token : token + 1], Groups(1)))
        assert alone == pytest.approx({(0, e): w for (t, e), w in together.items() if t == token})
    assert int(router.route(h_TD, Groups(TOKENS)).statistics.groups) == 0


def test_thresholds_of_one_group_are_passed_by_those_whom_it_took() -> None:
    router, h_TD = make_router(), make_tokens()
    trained = router.route(h_TD, Groups(TOKENS))
    router.update(trained.statistics)
    router.eval()
    assert rows_of(router.route(h_TD, Groups(TOKENS))) == rows_of(trained)


def test_before_the_first_update_an_expert_takes_what_it_likes_more_than_the_mean() -> None:
    router = make_router().eval()
    routing = router.route(make_tokens(), Groups(TOKENS))
    assert set(routing.token_R.tolist()) == set(range(TOKENS))
    assert float(routing.weight_R.detach().min()) >= 1 / NUM_EXPERTS


def test_after_the_warm_up_training_routes_by_thresholds_and_goes_on_learning_them() -> None:
    router, h_TD = make_router(threshold_warmup=1), make_tokens()
    router.update(router.route(h_TD, Groups(TOKENS)).statistics)
    other_TD = 2 * h_TD
    trained = router.route(other_TD, Groups(TOKENS))
    assert int(trained.statistics.groups) == 1
    _, cutoff_GE = choose((other_TD @ router.weight.t()).softmax(-1).detach(), Groups(TOKENS), 1.0)
    torch.testing.assert_close(trained.statistics.cutoff_E, cutoff_GE[0])
    router.eval()
    assert rows_of(router.route(other_TD, Groups(TOKENS))) == rows_of(trained)
    assert len(rows_of(trained)) != TOKENS


def test_acausal_routing_compares_at_evaluation_and_ends_with_its_block() -> None:
    router, h_TD = make_router().eval(), make_tokens()
    with acausal_routing(torch.nn.ModuleList([router])):
        acausal = router.route(h_TD, Groups(TOKENS))
    assert acausal.statistics.load_E.tolist() == [TOKENS // NUM_EXPERTS] * NUM_EXPERTS
    assert int(acausal.statistics.groups) == 1
    assert int(router.route(h_TD, Groups(TOKENS)).statistics.groups) == 0


def test_routing_writes_no_state() -> None:
    router = make_router()
    before = {name: value.clone() for name, value in router.state_dict().items()}
    for _ in range(2):
        router.route(make_tokens(), Groups(8))
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())


def test_the_margin_loss_wants_each_taken_token_for_its_best_expert() -> None:
    router, h_TD = make_router(), make_tokens()
    routing = router.route(h_TD, Groups(8))
    best: dict[int, tuple[float, int]] = {}
    for (token, expert), weight in rows_of(routing).items():
        best[token] = max(best.get(token, (0.0, 0)), (weight, expert))
    expected = 0.0
    for start in range(0, TOKENS, 8):
        members = [t for t in range(start, start + 8) if t in best]
        target_T = torch.tensor([best[t][1] for t in members])
        rows_TD = h_TD[members]
        logits_TE = rows_TD @ router.weight.t()
        losses_T = margin_losses(logits_TE, rows_TD, router.weight, target_T, margin=2, ease=100.0)
        expected += float(losses_T.detach().mean())
    assert len(best) < TOKENS
    assert float(routing.losses["margin_loss"].detach()) == pytest.approx(expected)


def test_the_margin_hardens_with_the_updates_and_may_be_off() -> None:
    router, h_TD = make_router(margin_anneal_decay=0.5), make_tokens()

    def loss() -> float:
        return float(router.route(h_TD, Groups(8)).losses["margin_loss"].detach())

    first = loss()
    router.updates += 10
    assert loss() > first
    off = make_router(margin_coef=0.0).route(h_TD, Groups(8)).losses["margin_loss"]
    assert float(off) == 0


def make_moe(**fields: object) -> MoE:
    spec = ModelSpec(
        num_layers=1,
        d_model=D_MODEL,
        num_heads=1,
        d_ff=8,
        num_experts=(NUM_EXPERTS,),
        expert_interval=1,
        router=spec_of(**fields),
    )
    moe = MoE(spec, NUM_EXPERTS).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(generator=generator)
    return moe


def answer(moe: MoE, expert: int, h_D: Tensor) -> Tensor:
    experts = moe.experts
    up_F = experts.up_weight[expert] @ h_D + experts.up_bias[expert]
    hidden_F = torch.nn.functional.gelu(up_F, approximate="tanh")
    return experts.down_weight[expert] @ hidden_F + experts.down_bias[expert]
