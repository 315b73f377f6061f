"""Weights on huge pages: a step reads all, and looking up 4 KiB pages takes 7 % of its time."""

import ctypes
import functools
import mmap
from collections.abc import Callable

HUGE_BYTES = 2 * 2**20
_COLLAPSE = 25  # MADV_COLLAPSE, since Linux 6.1: copies to huge pages at once


def on_huge_pages(address: int, num_bytes: int) -> bool:
    """Have the huge pages within this memory be such; whether the system did it.

    What the memory holds stays as it is. Those at its ends, which hold its neighbours too, are
    asked for as well and may be refused: weights lie side by side, and no gaps stay between them.
    """
    advise, end = _madvise(), address + num_bytes
    if advise is None:
        return False
    first, last = address + -address % HUGE_BYTES, end - end % HUGE_BYTES
    for place in {first - HUGE_BYTES, last}:
        advise(place, HUGE_BYTES, _COLLAPSE)
    return last > first and advise(first, last - first, _COLLAPSE) == 0


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's own, where pages are of the usual size; Python's is for files alone."""
    if mmap.PAGESIZE != 4096:
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
