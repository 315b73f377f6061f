"""gptmoe.parallel.schedules: every pass once, in an order that never waits in a circle."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.errors import LayoutError
from gptmoe.parallel.schedules import Action, Kind, most_alive, schedule


def stages(kind: Kind, pp: int, microbatches: int, chunks: int = 1) -> list[list[Action]]:
    return [schedule(kind, pp, stage, microbatches, chunks) for stage in range(pp)]


def play(plan: list[list[Action]], chunks: int) -> int:
    """Let each stage act as soon as what it needs has come; the rounds until all are done."""
    pp, rounds = len(plan), 0
    last = pp * chunks - 1
    waiting, done = [list(actions) for actions in plan], set[tuple[bool, int, int]]()
    while any(waiting):
        rounds += 1
        acted = []
        for stage, actions in enumerate(waiting):
            if not actions:
                continue
            action = actions[0]
            chunk = action.chunk * pp + stage
            before = chunk - 1 if action.is_forward else chunk + 1
            ready = (action.is_forward, before, action.microbatch) in done
            if action.is_forward:
                ready = ready or chunk == 0
            else:
                own = (True, chunk, action.microbatch) in done
                ready = own and (ready or chunk == last)
            if ready:
                acted.append((action.is_forward, chunk, action.microbatch))
                actions.pop(0)
        assert acted, f"all wait: {[[str(a) for a in actions[:1]] for actions in waiting]}"
        done.update(acted)
    return rounds


kinds = st.sampled_from(["gpipe", "1f1b"])


@given(kind=kinds, pp=st.integers(1, 6), microbatches=st.integers(1, 10))
def test_every_pass_once_and_nobody_waits_for_ever(kind: Kind, pp: int, microbatches: int) -> None:
    plan = stages(kind, pp, microbatches)
    for actions in plan:
        assert len(set(actions)) == len(actions) == 2 * microbatches
    # forward and backward take as long here: pp - 1 rounds of each are the bubble
    assert play(plan, 1) == 2 * (microbatches + pp - 1)


@given(pp=st.integers(2, 4), rounds=st.integers(1, 4), chunks=st.integers(1, 4))
def test_interleaving_does_every_chunk_once_with_a_smaller_bubble(
    pp: int, rounds: int, chunks: int
) -> None:
    microbatches = pp * rounds
    plan = stages("interleaved", pp, microbatches, chunks)
    for actions in plan:
        assert len(set(actions)) == len(actions) == 2 * microbatches * chunks
    assert play(plan, chunks) <= 2 * (microbatches * chunks + pp - 1) + 2 * (pp - 1)


@given(kind=kinds, pp=st.integers(1, 4), rounds=st.integers(1, 3), chunks=st.integers(2, 3))
def test_gradients_of_a_chunk_add_up_in_the_order_of_microbatches(
    kind: Kind, pp: int, rounds: int, chunks: int
) -> None:
    microbatches = pp * rounds
    plans = stages(kind, pp, microbatches) + stages("interleaved", pp, microbatches, chunks)
    for actions in plans:
        for chunk in range(chunks):
            order = [a.microbatch for a in actions if a.chunk == chunk and not a.is_forward]
            assert order == sorted(order)


def test_one_forward_one_backward_keeps_few_activations() -> None:
    assert [most_alive(actions) for actions in stages("1f1b", 4, 16)] == [4, 3, 2, 1]
    assert [most_alive(actions) for actions in stages("gpipe", 4, 16)] == [16] * 4
    assert [str(a) for a in schedule("1f1b", 2, 0, 2)] == ["F0.0", "F1.0", "B0.0", "B1.0"]


@pytest.mark.parametrize(
    ("kind", "microbatches", "chunks", "message"),
    [
        (
            "1f1b",
            4,
            2,
            "parallel.chunks=2 needs parallel.schedule='interleaved', found '1f1b'; "
            "change one of them",
        ),
        (
            "interleaved",
            6,
            2,
            "parallel.schedule='interleaved' needs a multiple of parallel.pp=4 microbatches a "
            "step, found 6; use pp=1, 2, 3 or 6, or 1f1b",
        ),
    ],
)
def test_what_a_schedule_cannot_do(
    kind: Kind, microbatches: int, chunks: int, message: str
) -> None:
    with pytest.raises(LayoutError, match=f"^{re.escape(message)}$"):
        schedule(kind, 4, 0, microbatches, chunks)
