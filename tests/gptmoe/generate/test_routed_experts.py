"""Experts in the program of their layer: with the bits of its parts, counted, or left out of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gptmoe.generate.cache import KVCache
from gptmoe.generate.kernels.library import kernels
from gptmoe.generate.kernels.row_router import RowRouter
from gptmoe.generate.kernels.tasks import Calls
from gptmoe.model.dispatch import CountedDispatcher, LocalDispatcher, Sent
from gptmoe.model.routers import ROUTERS
from gptmoe.model.routing import Routing
from gptmoe.model.spec import RouterKind
from gptmoe.model.transformer import GPT
from gptmoe.model.turns import Pausing

from .fused_networks import CPU, each_form, make_fused, moe_of, steps, taken_apart

pytestmark = pytest.mark.skipif(kernels() is None, reason="no C compiler (cc) is installed")
each_kind = pytest.mark.parametrize("kind", ROUTERS)
ALONE = tuple(kind for kind in ROUTERS if kind != "expert_choice")
"""Routers whose layers are one call."""


@each_kind
@each_form
@pytest.mark.parametrize("experts", [(5, 2), (40, 3)])
def test_bits_are_those_of_the_parts(form: str, kind: RouterKind, experts: tuple[int, ...]) -> None:
    fused = make_fused(form, kind=kind, experts=experts)
    apart = taken_apart(make_fused(form, kind=kind, experts=experts))
    for rows in (1, 2, 5, 8, 32, 33):
        expected = steps(apart, rows)
        assert expected.isfinite().all()
        assert torch.equal(steps(fused, rows), expected)


@each_form
@pytest.mark.parametrize("kind", ["switch", "top2"])
def test_dense_layers_beside_experts_change_no_bit(form: str, kind: RouterKind) -> None:
    fused = make_fused(form, kind=kind, residual_moe=True)
    apart = taken_apart(make_fused(form, kind=kind, residual_moe=True))
    for rows in (1, 3, 32):
        assert torch.equal(steps(fused, rows), steps(apart, rows))


@pytest.mark.parametrize("kind", ALONE)
def test_neighbours_change_no_bit(kind: RouterKind) -> None:
    network = make_fused(kind=kind)
    most = steps(network, 8)
    for rows in (1, 2, 3, 7):
        assert torch.equal(steps(network, rows), most[:, :rows])


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit(threads: int) -> None:
    network, before = make_fused(kind="top2"), torch.get_num_threads()
    expected = steps(network, 8)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(steps(network, 8), expected)
    finally:
        torch.set_num_threads(before)


@each_form
@pytest.mark.parametrize("kind", ALONE)
def test_a_step_is_one_call(form: str, kind: RouterKind, programs: list[Calls]) -> None:
    network = make_fused(form, kind=kind)
    for rows in (1, 3):
        programs.clear()
        steps(network, rows)
        assert len(programs) == 3


def test_rows_share_what_a_layer_keeps() -> None:
    """Tasks of experts are many: they are composed once, not for each number of rows."""
    network = make_fused()
    cache = KVCache(network.spec, 4, torch.bfloat16, CPU)
    steps(network, 1, cache)
    first = dict(cache.workspace.experts)
    steps(network, 4, cache)
    assert len(first) == 2
    assert dict(cache.workspace.experts) == first
    del network, first
    assert not cache.workspace.experts


class Asked:
    """A dispatcher of which nobody knows that its experts are here."""

    def __init__(self) -> None:
        self.rows, self._inner = 0, LocalDispatcher()

    def dispatch(self, h_TD: Tensor, routing: Routing) -> Pausing[Sent]:
        self.rows += len(routing.expert_R)
        return self._inner.dispatch(h_TD, routing)

    def combine(self, rows_RD: Tensor, sent: Sent) -> Pausing[Tensor]:
        return self._inner.combine(rows_RD, sent)


@pytest.fixture
def check(programs: list[Calls]) -> Callable[..., None]:
    """Whether the experts of the second layer are in the program, with the same bits anyhow."""

    def check(network: GPT, inside: bool, **more: Any) -> None:
        expected = steps(taken_apart(make_fused()), 3)
        programs.clear()
        assert torch.equal(steps(network, 3, **more), expected)
        # Else each layer is one, and this one two: before the experts, and theirs.
        assert len(programs) == 3 * (1 if inside else 5)

    return check


def test_experts_elsewhere_are_asked_through_their_dispatcher(check: Callable[..., None]) -> None:
    network, asked = make_fused(), Asked()
    moe = moe_of(network)
    check(network, inside=True)
    moe.dispatcher = asked
    check(network, inside=False)
    assert asked.rows == 3 * 3
    moe.dispatcher = CountedDispatcher(Asked(), [0] * 5, range(5))
    check(network, inside=False)
    moe.dispatcher = LocalDispatcher()
    check(network, inside=True)


def test_what_a_program_cannot_hold_is_computed_beside_it(programs: list[Calls]) -> None:
    """Padding is not routed; an Expert Residual wants to know the routing."""
    network = make_fused()
    expected = steps(network, 3)
    programs.clear()
    assert torch.equal(steps(network, 3, valid_BT=torch.ones(1, 3, dtype=torch.bool)), expected)
    assert len(programs) == 3 * (2 + 2 * 2)
    chosen = make_fused(kind="expert_choice")
    programs.clear()
    steps(chosen, 3)
    assert len(programs) >= 3 * 4
    assert not KVCache(chosen.spec, 1, torch.bfloat16, CPU).workspace.experts


@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_rows_of_each_expert_are_counted(kind: RouterKind, rows: int) -> None:
    loads = []
    for network in (make_fused(kind=kind), taken_apart(make_fused(kind=kind))):
        load = [0] * 5
        moe = moe_of(network)
        moe.dispatcher = CountedDispatcher(moe.dispatcher, load, range(5))
        steps(network, rows)
        loads.append(load)
    assert loads[0] == loads[1]
    assert sum(loads[0]) == 3 * rows * (2 if kind == "top2" else 1)


def test_an_expert_that_several_want_and_experts_that_nobody_wants() -> None:
    found, loads = [], []
    for network in (make_fused(), taken_apart(make_fused())):
        router, load = moe_of(network).router, [0] * 5
        assert isinstance(router, RowRouter)
        router.weight.data.zero_()
        moe_of(network).dispatcher = CountedDispatcher(LocalDispatcher(), load, range(5))
        found.append(steps(network, 6))
        loads.append(load)
    assert torch.equal(*found)
    assert loads == [[3 * 6, 0, 0, 0, 0]] * 2, "of equal experts the first"
