"""top2, s_base and loss_free against plain Python loops, per routing group.

Letters: T tokens, D model width, E experts.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptmoe.model.loss_free import LossFreeRouter
from gptmoe.model.routing import Groups, LinearRouter, Statistics
from gptmoe.model.s_base import SinkhornRouter
from gptmoe.model.spec import RouterSpec
from gptmoe.model.top2 import Top2Router
from tests.gptmoe.model.test_sinkhorn import by_loops

D_MODEL = 5
Rows = list[tuple[int, int, float]]
"""(token, expert, weight)"""
any_groups = given(
    num_experts=st.integers(2, 6),
    num_groups=st.integers(1, 3),
    per_group=st.integers(1, 10),
    capacity_factor=st.sampled_from([0.1, 0.5, 1.0, 1.25, 2.0, math.inf]),
    min_capacity=st.integers(0, 3),
)


def make(cls: type[LinearRouter], num_experts: int, spec: RouterSpec | None = None) -> LinearRouter:
    router = cls(D_MODEL, num_experts, spec or RouterSpec()).double()
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(num_experts))
    return router


def make_tokens(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, D_MODEL, generator=generator, dtype=torch.float64)


def logits_of(router: LinearRouter, h_TD: Tensor) -> list[list[float]]:
    return [
        [sum(w * h for w, h in zip(row, h_D, strict=True)) for row in router.weight.tolist()]
        for h_D in h_TD.tolist()
    ]


def softmax(logits: list[float]) -> list[float]:
    total = sum(map(math.exp, logits))
    return [math.exp(logit) / total for logit in logits]


def best(row: list[float]) -> int:
    return row.index(max(row))


def admitted(choices: list[Rows], num_experts: int, tokens: int, spec: RouterSpec) -> Rows:
    """Of one group: first choices before second ones, each in position order."""
    factor = min(spec.capacity_factor, num_experts)
    capacity = math.ceil(len(choices) * tokens * factor / num_experts)
    room = [max(spec.min_capacity, capacity)] * num_experts
    kept = []
    for turn in choices:
        for token, expert, weight in turn:
            if room[expert]:
                room[expert] -= 1
                kept.append((token, expert, weight))
    return kept


def assert_rows(router: LinearRouter, h_TD: Tensor, per_group: int, expected: Rows) -> None:
    routing = router.route(h_TD, Groups(per_group))
    found = list(
        zip(
            routing.token_R.tolist(),
            routing.expert_R.tolist(),
            routing.weight_R.tolist(),
            strict=True,
        )
    )
    assert len(found) == len(expected)
    wanted = {(token, expert): weight for token, expert, weight in expected}
    assert {(token, expert): pytest.approx(weight) for token, expert, weight in found} == wanted
    statistics = routing.statistics
    choices = router.spec.choices
    assert int(statistics.dropped) == choices * len(h_TD) - len(expected)
    assert int(statistics.tokens) == len(h_TD)
    assert int(statistics.unrouted) == len(h_TD) - len({token for token, _, _ in expected})
    assert int(statistics.load_E.sum()) == choices * len(h_TD)
    assert not statistics.cutoff_E.any()


@any_groups
def test_top2(
    num_experts: int, num_groups: int, per_group: int, capacity_factor: float, min_capacity: int
) -> None:
    spec = RouterSpec(kind="top2", capacity_factor=capacity_factor, min_capacity=min_capacity)
    router = make(Top2Router, num_experts, spec)
    h_TD = make_tokens(num_groups * per_group)
    rows = [softmax(logits) for logits in logits_of(router, h_TD)]
    expected: Rows = []
    aux_loss = 0.0
    for group in range(num_groups):
        firsts: Rows = []
        seconds: Rows = []
        members = range(group * per_group, (group + 1) * per_group)
        for token in members:
            first = best(rows[token])
            second = best([-1.0 if e == first else p for e, p in enumerate(rows[token])])
            share = rows[token][first] / (rows[token][first] + rows[token][second])
            firsts.append((token, first, share))
            seconds.append((token, second, 1 - share))
        expected += admitted([firsts, seconds], num_experts, per_group, spec)
        for expert in range(num_experts):
            chosen = sum(row[1] == expert for row in firsts) / per_group
            aux_loss += num_experts * chosen * sum(rows[t][expert] for t in members) / per_group
    assert_rows(router, h_TD, per_group, expected)
    losses = router.route(h_TD, Groups(per_group)).losses
    assert losses["aux_loss"].item() == pytest.approx(aux_loss, rel=1e-12)


@any_groups
def test_s_base(
    num_experts: int, num_groups: int, per_group: int, capacity_factor: float, min_capacity: int
) -> None:
    spec = RouterSpec(kind="s_base", capacity_factor=capacity_factor, min_capacity=min_capacity)
    router = make(SinkhornRouter, num_experts, spec)
    h_TD = make_tokens(num_groups * per_group)
    logits = logits_of(router, h_TD)
    expected: Rows = []
    for first in range(0, len(logits), per_group):
        plan = logits[first : first + per_group]
        if per_group > 1:
            plan = by_loops(plan, spec.sinkhorn_iterations)
        chosen = [
            (first + place, best(row), softmax(logits[first + place])[best(row)])
            for place, row in enumerate(plan)
        ]
        expected += admitted([chosen], num_experts, per_group, spec)
    assert_rows(router, h_TD, per_group, expected)
    assert set(router.route(h_TD, Groups(per_group)).losses) == {"z_loss"}


@any_groups
def test_loss_free(
    num_experts: int, num_groups: int, per_group: int, capacity_factor: float, min_capacity: int
) -> None:
    spec = RouterSpec(kind="loss_free", capacity_factor=capacity_factor, min_capacity=min_capacity)
    router = make(LossFreeRouter, num_experts, spec)
    assert isinstance(router, LossFreeRouter)
    bias = [0.3 * (-1) ** expert for expert in range(num_experts)]
    router.bias.copy_(torch.tensor(bias))
    h_TD = make_tokens(num_groups * per_group)
    chosen: Rows = []
    for token, row in enumerate(logits_of(router, h_TD)):
        score = [1 / (1 + math.exp(-logit)) for logit in row]
        expert = best([s + b for s, b in zip(score, bias, strict=True)])
        chosen.append((token, expert, score[expert]))
    expected: Rows = []
    for first in range(0, len(chosen), per_group):
        expected += admitted([chosen[first : first + per_group]], num_experts, per_group, spec)
    assert_rows(router, h_TD, per_group, expected)
    assert set(router.route(h_TD, Groups(per_group)).losses) == {"z_loss"}


def test_the_plan_is_for_training_alone() -> None:
    router = make(SinkhornRouter, 4, RouterSpec(kind="s_base", capacity_factor=math.inf)).eval()
    h_TD = make_tokens(40)
    routing = router.route(h_TD, Groups(40))
    assert routing.expert_R.tolist() == [best(row) for row in logits_of(router, h_TD)]
    assert routing.expert_R.tolist() != router.train().route(h_TD, Groups(40)).expert_R.tolist()


def test_gradients_know_nothing_of_the_plan() -> None:
    router = make(SinkhornRouter, 4, RouterSpec(kind="s_base", capacity_factor=math.inf))
    h_TD = make_tokens(12)
    routing = router.route(h_TD, Groups(12))
    (found,) = torch.autograd.grad(routing.weight_R.sum(), router.weight)
    plain = torch.nn.functional.linear(h_TD, router.weight).softmax(-1)
    chosen = plain.gather(-1, routing.expert_R.unsqueeze(-1)).sum()
    (expected,) = torch.autograd.grad(chosen, router.weight)
    torch.testing.assert_close(found, expected)


def loaded(load: list[int]) -> Statistics:
    zero = Statistics.zero(len(load))
    return zero + Statistics(
        torch.tensor(load), zero.dropped, zero.tokens, zero.entropy, zero.unrouted,
        zero.cutoff_E, zero.groups,
    )  # fmt: skip


def test_the_bias_is_nudged_by_the_sign_of_the_load_s_error() -> None:
    router = make(LossFreeRouter, 4, RouterSpec(kind="loss_free", bias_rate=0.25))
    assert isinstance(router, LossFreeRouter)
    assert router.bias.tolist() == [0.0] * 4
    router.update(loaded([9, 5, 4, 2]))
    assert router.bias.tolist() == [-0.25, 0.0, 0.25, 0.25]
    router.update(loaded([0, 0, 0, 0]))
    assert router.bias.tolist() == [-0.25, 0.0, 0.25, 0.25]


def test_the_bias_balances_a_skewed_router() -> None:
    spec = RouterSpec(kind="loss_free", bias_rate=0.02, capacity_factor=math.inf)
    router = make(LossFreeRouter, 8, spec)
    h_TD = make_tokens(512) + 1.0

    def worst() -> float:
        load_E = router.route(h_TD, Groups(512)).statistics.load_E.double()
        return float(load_E.max() / load_E.mean())

    before = worst()
    for _ in range(200):
        router.update(router.route(h_TD, Groups(512)).statistics)
    assert before > 2.5
    assert worst() < 1.5
