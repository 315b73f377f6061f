"""Pipeline schedules as data: what each stage does, in which order. No torch.

A stage holds `chunks` groups of layers. Chunk c of stage s computes the model's chunk c * pp + s:
forward in that order, backward in reverse. All schedules add up a parameter's gradients in the same
order of microbatches, and so give the same bits.
"""

from dataclasses import dataclass
from typing import Literal

from gptmoe.errors import LayoutError

from .layout import choices, divisors

Kind = Literal["gpipe", "1f1b", "interleaved"]


@dataclass(frozen=True, slots=True)
class Action:
    """One pass of one microbatch through one of the stage's chunks."""

    is_forward: bool
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{'F' if self.is_forward else 'B'}{self.microbatch}.{self.chunk}"


def schedule(kind: Kind, pp: int, stage: int, microbatches: int, chunks: int = 1) -> list[Action]:
    """The actions of one stage. Raises LayoutError for a kind that cannot do it."""
    if kind == "interleaved":
        return _interleaved(pp, stage, microbatches, chunks)
    if chunks > 1:
        raise LayoutError(
            f"parallel.chunks={chunks} needs parallel.schedule='interleaved', found {kind!r}; "
            "change one of them"
        )
    if kind == "gpipe":
        forward = [Action(True, 0, m) for m in range(microbatches)]
        return forward + [Action(False, 0, m) for m in range(microbatches)]
    return _one_forward_one_backward(pp, stage, microbatches)


def most_alive(actions: list[Action]) -> int:
    """The largest number of passes whose activations are kept at a time."""
    alive = most = 0
    for action in actions:
        alive += 1 if action.is_forward else -1
        most = max(most, alive)
    return most


def _one_forward_one_backward(pp: int, stage: int, microbatches: int) -> list[Action]:
    """1F1B (Narayanan et al. 2021, arXiv 2104.04473, figure 4): at most pp - stage alive."""
    ahead = min(pp - stage - 1, microbatches)
    actions = [Action(True, 0, m) for m in range(ahead)]
    for m in range(microbatches):
        if m + ahead < microbatches:
            actions.append(Action(True, 0, m + ahead))
        actions.append(Action(False, 0, m))
    return actions


def _interleaved(pp: int, stage: int, microbatches: int, chunks: int) -> list[Action]:
    """Interleaved 1F1B (arXiv 2104.04473, section 2.2): the bubble shrinks by the chunks.

    Microbatches go through in rounds of pp: first all of a round through chunk 0, then chunk 1, ...
    """
    if microbatches % pp:
        raise LayoutError(
            f"parallel.schedule='interleaved' needs a multiple of parallel.pp={pp} microbatches a "
            f"step, found {microbatches}; use pp={choices(divisors(microbatches))}, or 1f1b"
        )
    total = microbatches * chunks
    ahead = min(2 * (pp - stage - 1) + (chunks - 1) * pp, total)

    def action(number: int, *, is_forward: bool) -> Action:
        chunk = number // pp % chunks
        microbatch = number // (pp * chunks) * pp + number % pp
        return Action(is_forward, chunk if is_forward else chunks - 1 - chunk, microbatch)

    actions = [action(n, is_forward=True) for n in range(ahead)]
    for n in range(total):
        if n + ahead < total:
            actions.append(action(n + ahead, is_forward=True))
        actions.append(action(n, is_forward=False))
    return actions
