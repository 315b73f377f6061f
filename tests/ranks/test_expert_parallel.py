"""Data and expert parallelism give one process's loss, gradients, norm and weights."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gptmoe.checkpoint.boxes import Box, gaps, overlap
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.parallel.layout import Layout
from tests.ranks.pool import RankPool
from tests.ranks.sgd import LENGTH, NUM_SEQUENCES, Case, Trained, train

ROUTER = RouterSpec(capacity_factor=1.0, min_capacity=1, z_loss_coef=1e-3, group_sequences=2)
SPEC = ModelSpec(
    num_layers=4,
    d_model=16,
    num_heads=2,
    d_ff=24,
    vocab_size=40,
    max_seq_len=LENGTH,
    num_experts=(4, 8),
    init_std=0.2,
    router=ROUTER,
)
CASES = {
    "plain": Case(spec=SPEC),
    "ranks with only padding": Case(spec=SPEC, padded_from=2),
    "all tokens to one expert": Case(
        spec=replace(SPEC, router=replace(ROUTER, capacity_factor=math.inf)), crowded=True
    ),
}
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_layout = pytest.mark.parametrize(("dp", "ep"), LAYOUTS)


def one_process(case: Case) -> Trained:
    """The reference: one rank, the whole batch in one pass."""
    return train(0, Layout(dp=1), replace(case, microbatch=NUM_SEQUENCES))


def assemble(ranks: list[Trained]) -> dict[str, Tensor]:
    """Whole parameters from the boxes that ranks would write; all copies must be the same bits."""
    weights = {}
    for holders in zip(*(rank.owned for rank in ranks), strict=True):
        name, whole = holders[0].name, Box.whole(holders[0].full_shape)
        written = [o for o in holders if o.writes]
        assert not gaps(whole, [o.box for o in written]), name
        assert not overlap([o.box for o in written]), name
        weights[name] = torch.empty(whole.shape, dtype=torch.float64)
        for o in written:
            weights[name][o.box.slices(whole)] = o.parameter.detach()
        for o in holders:
            assert torch.equal(o.parameter, weights[name][o.box.slices(whole)]), name
    return weights


def layer_of(name: str) -> str:
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split(".")[0]


@each_case
@each_layout
def test_first_gradients_equal_one_process(pool: RankPool, dp: int, ep: int, case: Case) -> None:
    """Without clipping and at rate 1, the first step of SGD subtracts the gradient itself."""
    step = replace(case, steps=1, max_grad_norm=0.0, learning_rate=1.0)
    expected, start = one_process(step), assemble([one_process(replace(step, steps=0))])
    found = pool.run(dp, train, Layout(dp=dp, ep=ep), step)
    for rank in found:
        assert rank.losses == pytest.approx(expected.losses, rel=1e-10)
        assert rank.norms == pytest.approx(expected.norms, rel=1e-10)

    after = assemble([expected])
    gradients = {name: start[name] - after[name] for name in start}
    squares: dict[str, float] = {}
    for name, gradient in gradients.items():
        square = float(gradient.square().sum())
        squares[layer_of(name)] = squares.get(layer_of(name), 0.0) + square
    assert math.sqrt(sum(squares.values())) == pytest.approx(expected.norms[0], rel=1e-10)
    for name, weight in assemble(found).items():
        error = float((start[name] - weight - gradients[name]).norm())
        assert error <= 1e-10 * math.sqrt(squares[layer_of(name)]), name


@each_case
@each_layout
def test_six_clipped_steps_equal_one_process(pool: RankPool, dp: int, ep: int, case: Case) -> None:
    expected, found = one_process(case), pool.run(dp, train, Layout(dp=dp, ep=ep), case)
    assert min(expected.norms) > case.max_grad_norm
    for rank in found:
        assert rank.losses == pytest.approx(expected.losses, rel=1e-8)
        assert rank.norms == pytest.approx(expected.norms, rel=1e-8)
    assert sum(rank.dropped for rank in found) == expected.dropped
    torch.testing.assert_close(assemble(found), assemble([expected]), rtol=0, atol=1e-8)


def test_the_cases_are_what_they_say(pool: RankPool) -> None:
    layout = Layout(dp=4, ep=4)
    plain, padded, crowded = (pool.run(4, train, layout, case) for case in CASES.values())
    assert sum(rank.dropped for rank in plain) > 0
    assert all(rank.load_E.all() for rank in plain)
    assert [int(rank.load_E.sum()) > 0 for rank in padded] == [True, False, False, False]
    for rank in crowded:
        assert rank.load_E[0] > 0
        assert not rank.load_E[1:].any()
