"""gptmoe.model.sinkhorn: marginals, balance, padding, groups that stop by themselves.

Letters: G groups, N tokens of a group, E experts.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptmoe.model.sinkhorn import balanced_logits


def skewed(groups: int, tokens: int, experts: int, skew: float, seed: int = 0) -> Tensor:
    """Logits of which some experts get much more than others."""
    generator = torch.Generator().manual_seed(seed)
    liked_E = torch.randn(1, 1, experts, generator=generator, dtype=torch.float64)
    own = torch.randn(groups, tokens, experts, generator=generator, dtype=torch.float64)
    return own + skew * liked_E


def everything(logits_GNE: Tensor) -> Tensor:
    return torch.ones(logits_GNE.shape[:2], dtype=torch.bool)


def max_over_mean(logits_GNE: Tensor) -> float:
    """Of the loads that argmax gives."""
    load_E = torch.bincount(logits_GNE.argmax(-1).flatten(), minlength=logits_GNE.shape[-1])
    return float(load_E.max() / load_E.double().mean())


def by_loops(logits: list[list[float]], iterations: int) -> list[list[float]]:
    """The plan n x E with plain exp and sums: rows scaled to 1/n, then columns to 1/E."""
    n, experts = len(logits), len(logits[0])
    plan = [[math.exp(logit) for logit in row] for row in logits]
    for _ in range(iterations):
        plan = [[x / (n * sum(row)) for x in row] for row in plan]
        mass = [sum(column) for column in zip(*plan, strict=True)]
        plan = [[x / (experts * m) for x, m in zip(row, mass, strict=True)] for row in plan]
    return plan


@given(
    tokens=st.integers(2, 12),
    experts=st.integers(1, 6),
    iterations=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_it_is_the_plan_of_plain_loops(
    tokens: int, experts: int, iterations: int, seed: int
) -> None:
    logits_1NE = skewed(1, tokens, experts, 2.0, seed)
    found = balanced_logits(logits_1NE, everything(logits_1NE), iterations)[0].softmax(-1)
    plan = torch.tensor(by_loops(logits_1NE[0].tolist(), iterations), dtype=torch.float64)
    torch.testing.assert_close(found, plan / plan.sum(-1, keepdim=True), rtol=1e-9, atol=1e-12)


def test_every_expert_has_the_same_mass_and_every_token_its_own() -> None:
    logits_GNE = skewed(3, 40, 5, 3.0)
    balanced = balanced_logits(logits_GNE, everything(logits_GNE), iterations=60)
    plan_GNE = balanced.softmax(-1) / 40
    torch.testing.assert_close(plan_GNE.sum(1), torch.full((3, 5), 0.2, dtype=torch.float64))


def test_skewed_loads_come_under_one_and_a_half() -> None:
    logits_GNE = skewed(1, 2048, 64, 4.0)
    assert max_over_mean(logits_GNE) > 40
    balanced = balanced_logits(logits_GNE, everything(logits_GNE), iterations=8)
    assert max_over_mean(balanced) < 1.5


def test_large_logits_overflow_nothing() -> None:
    logits_GNE = 1e4 * skewed(2, 30, 4, 3.0)
    balanced = balanced_logits(logits_GNE.float(), everything(logits_GNE), iterations=8)
    assert balanced.dtype == torch.float32
    assert balanced.isfinite().all()


def test_padding_has_no_mass() -> None:
    logits_GNE = skewed(1, 24, 4, 2.0)
    valid_GN = torch.arange(24).unsqueeze(0) < 17
    padded = balanced_logits(logits_GNE, valid_GN, iterations=8)
    short = balanced_logits(logits_GNE[:, :17], everything(logits_GNE[:, :17]), iterations=8)
    torch.testing.assert_close(padded[:, :17], short, rtol=1e-12, atol=1e-12)


def test_one_token_goes_where_it_likes() -> None:
    logits_GNE = skewed(3, 1, 4, 2.0)
    assert torch.equal(balanced_logits(logits_GNE, everything(logits_GNE), 8), logits_GNE)


def test_a_group_of_padding_keeps_its_logits_and_disturbs_none() -> None:
    logits_GNE = skewed(2, 12, 3, 2.0)
    valid_GN = torch.tensor([[True], [False]]).expand(2, 12)
    found = balanced_logits(logits_GNE, valid_GN, iterations=8, tolerance=1e-3)
    assert torch.equal(found[1], logits_GNE[1])
    alone = balanced_logits(logits_GNE[:1], valid_GN[:1], iterations=8, tolerance=1e-3)
    assert torch.equal(found[:1], alone)


def test_a_group_stops_at_the_tolerance_whatever_the_others_do() -> None:
    logits_GNE = torch.cat([skewed(1, 20, 4, 0.1), skewed(1, 20, 4, 5.0, seed=1)])
    together = balanced_logits(logits_GNE, everything(logits_GNE), 200, tolerance=1e-4)
    for group in (0, 1):
        own = logits_GNE[group : group + 1]
        assert torch.equal(
            together[group : group + 1], balanced_logits(own, everything(own), 200, tolerance=1e-4)
        )
    plan = together.softmax(-1).mean(1)
    assert float((4 * plan - 1).abs().max()) < 1e-3
    exact = balanced_logits(logits_GNE, everything(logits_GNE), 200)
    assert not torch.equal(together, exact)


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_loose_tolerance_never_goes_on_for_longer(iterations: int) -> None:
    logits_GNE = skewed(1, 20, 4, 3.0)
    few = balanced_logits(logits_GNE, everything(logits_GNE), iterations)
    tight = balanced_logits(logits_GNE, everything(logits_GNE), iterations, tolerance=1e-12)
    assert torch.equal(few, tight)
