"""Computations that pause while their rows travel, so that another can use the time.

A pausing computation is a generator that yields whenever it has sent something and would next wait
for it. One alone is driven straight through; several take turns, as the copies of a microbatch do
(the "multi-copy" of Rapidformer).
"""

from collections.abc import Generator, Sequence
from typing import TypeVar

R = TypeVar("R")
Pausing = Generator[None, None, R]


def straight(computation: Pausing[R]) -> R:
    """Run one to its end."""
    return in_turns([computation])[0]


def in_turns(computations: Sequence[Pausing[R]]) -> list[R]:
    """Run several, each up to its next pause in turn; their results, in order."""
    results: dict[int, R] = {}
    while len(results) < len(computations):
        for index, computation in enumerate(computations):
            if index in results:
                continue
            try:
                next(computation)
            except StopIteration as end:
                results[index] = end.value
    return [results[index] for index in range(len(computations))]
