"""gptmoe.model.switch: top-1 routing against plain Python loops, per routing group.

Letters: B sequences, T tokens, D model width, E experts.
"""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptmoe.model.initialize import initialize
from gptmoe.model.routing import Groups, Routing
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.model.switch import SwitchRouter
from gptmoe.model.transformer import GPT

D_MODEL = 5


def make_router(num_experts: int, spec: RouterSpec | None = None) -> SwitchRouter:
    router = SwitchRouter(D_MODEL, num_experts, spec or RouterSpec()).double()
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(num_experts))
    return router


def make_tokens(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, D_MODEL, generator=generator, dtype=torch.float64)


def probabilities(router: SwitchRouter, h_TD: Tensor) -> list[list[float]]:
    rows = []
    for logits in scores(router, h_TD):
        total = sum(map(math.exp, logits))
        rows.append([math.exp(logit) / total for logit in logits])
    return rows


def scores(router: SwitchRouter, h_TD: Tensor) -> list[list[float]]:
    return [
        [sum(w * h for w, h in zip(row, h_D, strict=True)) for row in router.weight.tolist()]
        for h_D in h_TD.tolist()
    ]


def split(items: list[list[float]], size: int) -> list[list[list[float]]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def best(row: list[float]) -> int:
    return row.index(max(row))


any_routing = given(
    num_experts=st.integers(1, 6),
    num_groups=st.integers(1, 4),
    per_group=st.integers(1, 12),
    capacity_factor=st.sampled_from([0.1, 0.5, 1.0, 1.2, 1.25, 2.0, math.inf]),
    min_capacity=st.integers(0, 4),
)


@any_routing
def test_capacity_is_filled_in_position_order_within_each_group(
    num_experts: int, num_groups: int, per_group: int, capacity_factor: float, min_capacity: int
) -> None:
    spec = RouterSpec(capacity_factor=capacity_factor, min_capacity=min_capacity)
    router = make_router(num_experts, spec)
    h_TD = make_tokens(num_groups * per_group)
    routing = router.route(h_TD, Groups(per_group))

    factor = min(capacity_factor, num_experts)
    capacity = max(min_capacity, math.ceil(per_group * factor / num_experts))
    kept, dropped = [], 0
    for group, rows in enumerate(split(probabilities(router, h_TD), per_group)):
        taken = [0] * num_experts
        for place, row in enumerate(rows):
            if taken[best(row)] == capacity:
                dropped += 1
                continue
            taken[best(row)] += 1
            kept.append((group * per_group + place, best(row), max(row)))

    assert routing.token_R.tolist() == [token for token, _, _ in kept]
    assert routing.expert_R.tolist() == [expert for _, expert, _ in kept]
    assert routing.weight_R.tolist() == pytest.approx([weight for _, _, weight in kept])
    assert int(routing.statistics.dropped) == dropped


@pytest.mark.parametrize(
    ("factor", "capacity"), [(1.0, 13), (1.2, 15), (1e30, 100), (math.inf, 100)]
)
def test_capacity_of_100_tokens_for_8_experts(factor: float, capacity: int) -> None:
    router = make_router(8, RouterSpec(capacity_factor=factor, min_capacity=0))
    with torch.no_grad():
        router.weight.zero_()
    routing = router.route(make_tokens(100), Groups(100))
    assert routing.expert_R.tolist() == [0] * capacity


@any_routing
def test_losses_and_statistics_count_all_tokens_dropped_or_not(
    num_experts: int, num_groups: int, per_group: int, capacity_factor: float, min_capacity: int
) -> None:
    spec = RouterSpec(capacity_factor=capacity_factor, min_capacity=min_capacity)
    router = make_router(num_experts, spec)
    h_TD = make_tokens(num_groups * per_group)
    routing = router.route(h_TD, Groups(per_group))

    aux_loss = z_loss = 0.0
    rows_T, logits_T = probabilities(router, h_TD), scores(router, h_TD)
    for rows, logits in zip(split(rows_T, per_group), split(logits_T, per_group), strict=True):
        for expert in range(num_experts):
            share = sum(best(row) == expert for row in rows) / per_group
            aux_loss += num_experts * share * sum(row[expert] for row in rows) / per_group
        z_loss += sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits) / per_group
    assert routing.losses["aux_loss"].item() == pytest.approx(aux_loss, rel=1e-12)
    assert routing.losses["z_loss"].item() == pytest.approx(z_loss, rel=1e-12)

    statistics = routing.statistics
    load = [sum(best(row) == expert for row in rows_T) for expert in range(num_experts)]
    entropy = -sum(p * math.log(p) for row in rows_T for p in row)
    assert statistics.load_E.tolist() == load
    assert int(statistics.tokens) == num_groups * per_group
    assert float(statistics.entropy) == pytest.approx(entropy, rel=1e-12, abs=1e-12)


def test_perfect_balance_costs_exactly_one_a_group() -> None:
    router = SwitchRouter(4, 4, RouterSpec()).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    h_TD = torch.eye(4, dtype=torch.float64).repeat(6, 1)
    routing = router.route(h_TD, Groups(8))
    assert routing.losses["aux_loss"].item() == pytest.approx(3.0)


def test_gradients_of_the_losses() -> None:
    router = make_router(3)
    h_TD = make_tokens(12)

    def losses(h_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
        router.weight.data = weight_ED.data
        found = torch.func.functional_call(_Route(router), {"router.weight": weight_ED}, h_TD)
        return found["aux_loss"], found["z_loss"]

    weight_ED = router.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(losses, (h_TD.requires_grad_(), weight_ED))


class _Route(torch.nn.Module):
    def __init__(self, router: SwitchRouter) -> None:
        super().__init__()
        self.router = router

    def forward(self, h_TD: Tensor) -> dict[str, Tensor]:
        return self.router.route(h_TD, Groups(4)).losses


def test_padding_changes_nothing() -> None:
    router = make_router(4, RouterSpec(capacity_factor=1.0, min_capacity=0))
    h_TD = make_tokens(9)
    short = router.route(h_TD, Groups(9))
    padded_TD = torch.cat([h_TD, make_tokens(5)])
    padded = router.route(padded_TD, Groups(14, torch.arange(14) < 9))
    assert_same_routing(padded, short)


def assert_same_routing(found: Routing, expected: Routing) -> None:
    assert found.token_R.tolist() == expected.token_R.tolist()
    assert found.expert_R.tolist() == expected.expert_R.tolist()
    torch.testing.assert_close(found.weight_R, expected.weight_R)
    torch.testing.assert_close(found.losses, expected.losses)
    for name in ("load_E", "dropped", "tokens", "entropy"):
        one, other = getattr(found.statistics, name), getattr(expected.statistics, name)
        torch.testing.assert_close(one, other)


def test_a_group_of_only_padding_is_nothing_and_no_nan() -> None:
    router = make_router(3)
    h_TD = make_tokens(12).requires_grad_()
    routing = router.route(h_TD, Groups(4, torch.arange(12) < 8))
    total = routing.losses["aux_loss"] + routing.losses["z_loss"]
    (gradient,) = torch.autograd.grad(total, h_TD)
    without = router.route(h_TD[:8], Groups(4))
    assert_same_routing(routing, without)
    assert gradient.isfinite().all()
    assert not gradient[8:].any()


def test_nothing_is_dropped_at_evaluation() -> None:
    router = make_router(4, RouterSpec(capacity_factor=0.1, min_capacity=0))
    assert int(router.route(make_tokens(40), Groups(40)).statistics.dropped) > 0
    routing = router.eval().route(make_tokens(40), Groups(40))
    assert routing.token_R.tolist() == list(range(40))
    assert int(routing.statistics.dropped) == 0
    assert routing.losses == {}


def test_bfloat16_tokens_are_routed_in_float32() -> None:
    router = make_router(4).float()
    h_TD = make_tokens(16).bfloat16()
    routing = router.route(h_TD, Groups(16))
    assert {routing.weight_R.dtype, *(loss.dtype for loss in routing.losses.values())} == {
        torch.float32
    }
    assert_same_routing(routing, router.route(h_TD.float(), Groups(16)))


def test_routing_writes_no_state() -> None:
    router = make_router(4)
    before = copy.deepcopy(vars(router)), copy.deepcopy(router.state_dict())
    routing = router.route(make_tokens(16), Groups(8))
    torch.autograd.grad(routing.losses["aux_loss"] + routing.weight_R.sum(), router.weight)
    assert repr(vars(router)) == repr(before[0])
    assert not list(router.buffers())
    torch.testing.assert_close(router.state_dict(), before[1], rtol=0, atol=0)


def test_microbatches_of_whole_groups_change_no_drop_loss_or_gradient() -> None:
    spec = ModelSpec(
        num_layers=2,
        d_model=8,
        num_heads=2,
        d_ff=16,
        vocab_size=30,
        max_seq_len=6,
        num_experts=(4, 4),
        expert_interval=1,
        init_std=0.5,
        router=RouterSpec(capacity_factor=0.8, min_capacity=0, group_sequences=8),
    )
    model = GPT(spec, torch.float64).double()
    initialize(model, seed=0)
    token_BT = torch.randint(30, (32, 6), generator=torch.Generator().manual_seed(0))
    whole = losses_drops_gradients(model, token_BT, microbatch=32)
    assert whole[1].sum() > 0
    for microbatch in (8, 16):
        found = losses_drops_gradients(model, token_BT, microbatch)
        torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-12)


def losses_drops_gradients(
    model: GPT, token_BT: Tensor, microbatch: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Summed over microbatches: the losses, the drops of each layer, the gradients."""
    losses = torch.zeros(3, dtype=torch.float64)
    drops = torch.zeros(2, dtype=torch.long)
    parameters = list(model.parameters())
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for start in range(0, len(token_BT), microbatch):
        tokens = token_BT[start : start + microbatch]
        output = model(tokens)
        everywhere = torch.ones_like(tokens, dtype=torch.bool)
        terms = [model.loss_sum(output.hidden_BTD, tokens, everywhere)]
        for name in ("aux_loss", "z_loss"):
            terms.append(sum(routing.losses[name] for routing in output.routings))
        loss = torch.stack(terms)
        losses += loss.detach()
        drops += torch.stack([routing.statistics.dropped for routing in output.routings])
        parts = torch.autograd.grad(loss.sum(), parameters)
        gradients = [total + part for total, part in zip(gradients, parts, strict=True)]
    return losses, drops, gradients
