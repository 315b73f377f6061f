"""The matrix of layouts and ways to compute a step, each against one process, in float64.

Plain SGD, since Adam hides gradient errors.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from gptmoe.checkpoint.boxes import Box, gaps, overlap
from gptmoe.errors import ConfigError, LayoutError
from gptmoe.model.routers import ROUTERS
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.parallel.layout import Layout
from gptmoe.parallel.recompute import Recompute
from gptmoe.parallel.schedules import Kind, schedule
from tests.ranks.cover import Cell
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
    Layout(sharded=True),  # ZeRO 3, for which the model is dense
    Layout(dp=2, sharded=True),
    Layout(dp=4, sharded=True),  # 41 rows of the table: shards of 10 and 11
]
DIMENSIONS = {
    "layout": LAYOUTS,
    "case": list(CASES),
    "recompute": ["none", "sel", "full"],
    "schedule": ["1f1b", "gpipe", "interleaved"],
    "copies": [1, 2],
}
ROUTER_DIMENSIONS = {
    "kind": [kind for kind in ROUTERS if kind != "switch"],
    "layout": [
        Layout(dp=2),
        Layout(dp=2, ep=2),
        Layout(tp=2),
        Layout(tp=2, ep=2, sequence_parallel=False),
        Layout(dp=2, tp=2, ep=2, expert_tp=True),
        Layout(pp=2),
        Layout(tp=2, pp=2, ep=2),
    ],
    "case": ["plain", "ranks with only padding"],
    "recompute": ["none", "full"],
    "schedule": ["1f1b"],
    "copies": [1, 2],
    "jitter": [0.0, 0.2],
}
"""The other routers; jitter matters to some of them."""


def is_valid(
    layout: Layout, case: str, recompute: Recompute, schedule: Kind, copies: int, **router: Any
) -> bool:
    """Whether a cell of the matrix can be trained, and is not the same as another one."""
    if layout.sharded and (case == "all tokens to one expert" or copies > 1):
        return False
    if layout.pp == 1 and schedule != "1f1b":
        return False
    share = NUM_SEQUENCES // layout.dp
    return share >= 2 * copies and _can_pipe(layout, schedule, share // (2 * copies))


def _can_pipe(layout: Layout, kind: Kind, microbatches: int) -> bool:
    try:
        schedule(kind, layout.pp, 0, microbatches, layout.chunks)
    except (ConfigError, LayoutError):
        return False
    return True


def case_of(cell: Cell) -> Case:
    """How the model of a cell is trained."""
    case = CASES[cell["case"]]
    if cell["layout"].sharded:
        case = replace(case, spec=replace(case.spec, num_experts=()))
    if "kind" in cell:
        router = replace(ROUTER, kind=cell["kind"], jitter=cell["jitter"], bias_rate=0.05)
        case = replace(case, spec=replace(case.spec, router=router))
    return replace(
        case,
        recompute=cell["recompute"],
        schedule=cell["schedule"],
        copies=cell["copies"],
        microbatch=2 * cell["copies"],
    )


def describe(layout: Layout) -> str:
    """What differs from one rank."""
    fields = dataclasses.asdict(layout).items()
    changed = [f"{key}={value}" for key, value in fields if value != getattr(Layout(), key)]
    return " ".join(changed) or "one"


def name_of(cell: Cell) -> str:
    """A cell as a test's name."""
    parts = [describe(cell["layout"]), cell["case"], cell["recompute"], cell["schedule"]]
    parts.append(f"{cell['copies']} copies")
    if "kind" in cell:
        parts += [cell["kind"], f"jitter {cell['jitter']}"]
    return ", ".join(parts)


def one_process(case: Case) -> Trained:
    """The reference: one rank, the whole batch in one pass, nothing computed twice."""
    return _alone(
        replace(case, microbatch=NUM_SEQUENCES, recompute="none", schedule="1f1b", copies=1)
    )


@cache
def _alone(case: Case) -> Trained:
    return train(0, Layout(), case)


def assert_first_gradients_equal(pool: RankPool, cell: Cell) -> None:
    """Without clipping and at rate 1, the first step of SGD subtracts the gradient itself."""
    layout = cell["layout"]
    step = replace(case_of(cell), steps=1, max_grad_norm=0.0, learning_rate=1.0)
    expected, start = one_process(step), assemble([one_process(replace(step, steps=0))])
    found = pool.run(layout.world, train, layout, step)
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


def assert_six_steps_equal(pool: RankPool, cell: Cell) -> None:
    """With clipping active."""
    layout, case = cell["layout"], case_of(cell)
    expected, found = one_process(case), pool.run(layout.world, train, layout, case)
    assert min(expected.norms) > case.max_grad_norm
    for rank in found:
        assert rank.losses == pytest.approx(expected.losses, rel=1e-8)
        assert rank.norms == pytest.approx(expected.norms, rel=1e-8)
        assert rank.dropped == expected.dropped
        for name, buffer in rank.state.items():
            torch.testing.assert_close(buffer, expected.state[name], rtol=0, atol=1e-8)
    torch.testing.assert_close(assemble(found), assemble([expected]), rtol=0, atol=1e-8)


def assemble(ranks: Iterable[Trained]) -> dict[str, Tensor]:
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
    """The part of the model that a parameter belongs to."""
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split(".")[0]
