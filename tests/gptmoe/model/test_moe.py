"""gptmoe.model.moe: the layer equals a naive double loop, forward and backward, in float64.

Letters: T tokens, D model width, E experts.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptmoe.model.moe import MoE
from gptmoe.model.routing import Groups
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.model.switch import SwitchRouter

D_MODEL, D_FF, NUM_EXPERTS = 6, 10, 4
TOKENS, PER_GROUP = 24, 12


def make_moe(router: RouterSpec | None = None) -> MoE:
    spec = ModelSpec(
        num_layers=1,
        d_model=D_MODEL,
        num_heads=1,
        d_ff=D_FF,
        num_experts=(NUM_EXPERTS,),
        expert_interval=1,
        router=router or RouterSpec(),
    )
    moe = MoE(spec, NUM_EXPERTS).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(generator=generator)
    return moe


def switch_of(moe: MoE) -> SwitchRouter:
    assert isinstance(moe.router, SwitchRouter)
    return moe.router


def make_tokens() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(TOKENS, D_MODEL, generator=generator, dtype=torch.float64)


def naive_moe(moe: MoE, h_TD: Tensor, groups: Groups) -> Tensor:
    """Each token of each group: its best expert, if that has room, times its probability."""
    rows, router = [], switch_of(moe)
    valid = [True] * len(h_TD) if groups.valid_T is None else groups.valid_T.tolist()
    for start in range(0, len(h_TD), groups.tokens_per_group):
        members = range(start, start + groups.tokens_per_group)
        share = sum(valid[t] for t in members) * router.spec.capacity_factor / NUM_EXPERTS
        capacity = max(router.spec.min_capacity, math.ceil(share))
        room = [capacity if moe.training else len(members)] * NUM_EXPERTS
        for t in members:
            logits_E = router.weight @ h_TD[t]
            expert = int(logits_E.argmax())
            if not valid[t] or not room[expert]:
                rows.append(h_TD[t] * 0)
                continue
            room[expert] -= 1
            rows.append(logits_E.softmax(0)[expert] * naive_expert(moe, expert, h_TD[t]))
    return torch.stack(rows)


def naive_expert(moe: MoE, expert: int, h_D: Tensor) -> Tensor:
    experts = moe.experts
    up_F = F.linear(h_D, experts.up_weight[expert], experts.up_bias[expert])
    hidden_F = F.gelu(up_F, approximate="tanh")
    return F.linear(hidden_F, experts.down_weight[expert], experts.down_bias[expert])


def assert_same_as_naive(moe: MoE, h_TD: Tensor, groups: Groups) -> Tensor:
    """Compare output and the gradient of every input; return the output."""
    h_TD.requires_grad_()
    inputs = [h_TD, *moe.parameters()]
    probe_TD = make_tokens().flip(0)
    out_TD: Tensor = moe(h_TD, groups)[0]
    expected_TD = naive_moe(moe, h_TD, groups)
    torch.testing.assert_close(out_TD, expected_TD, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad((out_TD * probe_TD).sum(), inputs)
    expected = torch.autograd.grad((expected_TD * probe_TD).sum(), inputs, materialize_grads=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    return out_TD.detach()


def steer(moe: MoE, h_TD: Tensor, experts: list[int]) -> Tensor:
    """Make all tokens dislike every expert but `experts`, by their first feature."""
    with torch.no_grad():
        switch_of(moe).weight[:, 0] = -50.0
        switch_of(moe).weight[experts, 0] = 0.0
    h_TD[:, 0] = 1.0
    return h_TD


@pytest.mark.parametrize("training", [True, False])
def test_equals_a_naive_double_loop(training: bool) -> None:
    moe = make_moe(RouterSpec(capacity_factor=4.0)).train(training)
    out_TD = assert_same_as_naive(moe, make_tokens(), Groups(PER_GROUP))
    assert (out_TD != 0).all()


def test_dropped_tokens_get_nothing_and_cost_nothing() -> None:
    moe = make_moe(RouterSpec(capacity_factor=0.5, min_capacity=0))
    out_TD = assert_same_as_naive(moe, make_tokens(), Groups(PER_GROUP))
    taken = (out_TD != 0).any(-1).sum()
    assert 0 < taken <= 2 * NUM_EXPERTS * math.ceil(PER_GROUP * 0.5 / NUM_EXPERTS)


@pytest.mark.parametrize("training", [True, False])
def test_padding_is_not_routed(training: bool) -> None:
    moe = make_moe(RouterSpec(capacity_factor=1.0, min_capacity=0)).train(training)
    valid_T = torch.ones(TOKENS, dtype=torch.bool)
    valid_T[PER_GROUP - 4 : PER_GROUP] = valid_T[-1] = False
    out_TD = assert_same_as_naive(moe, make_tokens(), Groups(PER_GROUP, valid_T))
    assert not out_TD[~valid_T].any()


def test_experts_without_tokens() -> None:
    moe = make_moe()
    h_TD = steer(moe, make_tokens(), [1, 3])
    assert_same_as_naive(moe, h_TD, Groups(PER_GROUP))
    load_E = moe.router.route(h_TD, Groups(PER_GROUP)).statistics.load_E
    assert load_E[[0, 2]].tolist() == [0, 0]
    assert (load_E[[1, 3]] > 0).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("expert", [0, NUM_EXPERTS - 1])
def test_all_tokens_to_one_expert(training: bool, expert: int) -> None:
    moe = make_moe().train(training)
    h_TD = steer(moe, make_tokens(), [expert])
    out_TD = assert_same_as_naive(moe, h_TD, Groups(PER_GROUP))
    capacity = 4 if training else PER_GROUP
    taken_GP = (out_TD != 0).any(-1).view(-1, PER_GROUP)
    assert taken_GP[:, :capacity].all()
    assert not taken_GP[:, capacity:].any()


def test_only_padding() -> None:
    moe = make_moe()
    out_TD = assert_same_as_naive(moe, make_tokens(), Groups(PER_GROUP, torch.zeros(TOKENS).bool()))
    assert not out_TD.any()
