"""Every layout gives one process's loss, gradients, norm and weights, in float64."""

import dataclasses
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
    num_heads=4,
    d_ff=24,
    vocab_size=41,  # uneven slices
    max_seq_len=LENGTH,
    num_experts=(4, 8),
    init_std=0.2,
    dropout=0.1,
    router=ROUTER,
)
CASES = {
    "plain": Case(spec=SPEC),
    "ranks with only padding": Case(spec=SPEC, padded_from=2),
    "all tokens to one expert": Case(
        spec=replace(SPEC, router=replace(ROUTER, capacity_factor=math.inf)), crowded=True
    ),
}
LAYOUTS = [
    Layout(),
    Layout(dp=2),
    Layout(dp=2, ep=2),
    Layout(dp=4),
    Layout(dp=4, ep=2),
    Layout(dp=4, ep=4),
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=False),
    Layout(tp=2, ep=2),
    Layout(tp=2, ep=2, sequence_parallel=False),
    Layout(tp=4, ep=2),
    Layout(dp=2, tp=2),
    Layout(dp=2, tp=2, ep=2),
    Layout(dp=2, tp=2, ep=4),
    Layout(dp=2, tp=2, ep=4, sequence_parallel=False),
    Layout(dp=2, tp=2, ep=2, expert_tp=True),
    Layout(dp=2, tp=2, ep=2, expert_tp=True, sequence_parallel=False),
    Layout(pp=2),
    Layout(pp=2, chunks=2),
    Layout(pp=4),
    Layout(pp=2, chunk_layers=(1, 3)),
    Layout(dp=2, pp=2, ep=2),
    Layout(tp=2, pp=2, ep=2),
    Layout(tp=2, pp=2, chunks=2, expert_tp=True),
]


SHARDED = [
    (layout, Case(spec=spec, recompute=what))
    for layout in (
        Layout(sharded=True),
        Layout(dp=2, sharded=True),
        Layout(dp=4, sharded=True),  # 41 rows of the table: shards of 10 and 11
    )
    for spec in (replace(SPEC, num_experts=()),)
    for what in ("none", "full")
]


def describe(layout: Layout) -> str:
    """What differs from one rank, for a test's name."""
    fields = dataclasses.asdict(layout).items()
    changed = [f"{key}={value}" for key, value in fields if value != getattr(Layout(), key)]
    return " ".join(changed) or "one"


def describe_sharded(value: Layout | Case) -> str:
    return describe(value) if isinstance(value, Layout) else value.recompute


each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=describe)


def fit(case: Case, layout: Layout) -> Case:
    """The case with a schedule that can do the layout."""
    return replace(case, schedule="interleaved" if layout.chunks > 1 else case.schedule)


def one_process(case: Case) -> Trained:
    """The reference: one rank, the whole batch in one pass."""
    return train(0, Layout(), replace(case, microbatch=NUM_SEQUENCES))


def assemble(ranks: list[Trained]) -> dict[str, Tensor]:
    """Whole parameters from the boxes that ranks would write; all copies must be the same bits."""
    weights: dict[str, Tensor] = {}
    held = [o for rank in ranks for o in rank.owned]
    for name in {o.name: None for o in held}:
        holders = [o for o in held if o.name == name]
        whole = Box.whole(holders[0].full_shape)
        written = [part for o in holders if o.writes for part in o.parts(o.parameter.detach())]
        assert not gaps(whole, [box for box, _ in written]), name
        assert not overlap([box for box, _ in written]), name
        weights[name] = torch.empty(whole.shape, dtype=torch.float64)
        for box, values in written:
            weights[name][box.slices(whole)] = values
        for o in holders:
            for box, values in o.parts(o.parameter.detach()):
                assert torch.equal(values, weights[name][box.slices(whole)]), name
    return weights


def layer_of(name: str) -> str:
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split(".")[0]


each_sharded = pytest.mark.parametrize(("layout", "case"), SHARDED, ids=describe_sharded)


@each_case
@each_layout
def test_first_gradients_equal_one_process(pool: RankPool, layout: Layout, case: Case) -> None:
    assert_first_gradients_equal(pool, layout, case)


@each_sharded
def test_first_gradients_of_shards_equal_one_process(
    pool: RankPool, layout: Layout, case: Case
) -> None:
    assert_first_gradients_equal(pool, layout, case)


def assert_first_gradients_equal(pool: RankPool, layout: Layout, case: Case) -> None:
    """Without clipping and at rate 1, the first step of SGD subtracts the gradient itself."""
    step = replace(case, steps=1, max_grad_norm=0.0, learning_rate=1.0)
    expected, start = one_process(step), assemble([one_process(replace(step, steps=0))])
    found = pool.run(layout.world, train, layout, fit(step, layout))
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
def test_six_clipped_steps_equal_one_process(pool: RankPool, layout: Layout, case: Case) -> None:
    assert_six_steps_equal(pool, layout, case)


@each_sharded
def test_six_clipped_steps_of_shards_equal_one_process(
    pool: RankPool, layout: Layout, case: Case
) -> None:
    assert_six_steps_equal(pool, layout, case)


def assert_six_steps_equal(pool: RankPool, layout: Layout, case: Case) -> None:
    expected, found = one_process(case), pool.run(layout.world, train, layout, fit(case, layout))
    assert min(expected.norms) > case.max_grad_norm
    for rank in found:
        assert rank.losses == pytest.approx(expected.losses, rel=1e-8)
        assert rank.norms == pytest.approx(expected.norms, rel=1e-8)
        assert rank.dropped == expected.dropped
    torch.testing.assert_close(assemble(found), assemble([expected]), rtol=0, atol=1e-8)


VARIANTS = {
    "copies": Case(spec=SPEC, microbatch=4, copies=2),
    "copies with full recompute": Case(spec=SPEC, microbatch=4, copies=2, recompute="full"),
    "sel": Case(spec=SPEC, recompute="sel"),
    "full": Case(spec=SPEC, recompute="full"),
    "gpipe": Case(spec=SPEC, schedule="gpipe"),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(
    "layout",
    [Layout(dp=2, ep=2), Layout(tp=2, ep=2), Layout(pp=2), Layout(tp=2, pp=2, ep=2)],
    ids=describe,
)
def test_no_way_to_compute_a_step_changes_it(pool: RankPool, layout: Layout, variant: Case) -> None:
    expected, found = one_process(CASES["plain"]), pool.run(layout.world, train, layout, variant)
    for rank in found:
        assert rank.losses == pytest.approx(expected.losses, rel=1e-8)
        assert rank.norms == pytest.approx(expected.norms, rel=1e-8)
        assert rank.losses[0] == pytest.approx(expected.losses[0], rel=1e-10)
        assert rank.norms[0] == pytest.approx(expected.norms[0], rel=1e-10)
    torch.testing.assert_close(assemble(found), assemble([expected]), rtol=0, atol=1e-8)


def test_the_cases_are_what_they_say(pool: RankPool) -> None:
    layout = Layout(dp=4, ep=4)
    plain, padded, crowded = (pool.run(4, train, layout, case) for case in CASES.values())
    assert plain[0].dropped > 0
    assert all(rank.load_E.all() for rank in plain)
    assert [int(rank.load_E.sum()) > 0 for rank in padded] == [True, False, False, False]
    for rank in crowded:
        assert rank.load_E[0] > 0
        assert not rank.load_E[1:].any()
