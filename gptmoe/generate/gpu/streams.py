"""Streams for capturing, each with one owner.

torch hands out its 32 streams of a device in turn, again and again, and what cuBLAS keeps for a
stream is freed when a graph that was captured on it goes: other graphs of that stream would compute
in memory that is somebody else's by then.
"""

import weakref
from threading import Lock

import torch

from gptmoe.errors import ConfigError

IN_TURN = 32
"""Of a device; more than any process has versions of weights at a time."""

_taken: set[int] = set()
_lock = Lock()


def own_stream(owner: object, device: torch.device) -> torch.cuda.Stream:
    """One that nobody else gets while the owner is there. Raises ConfigError if none is left."""
    for _ in range(IN_TURN):
        stream = torch.cuda.Stream(device)
        with _lock:
            if stream.cuda_stream not in _taken:
                _taken.add(stream.cuda_stream)
                weakref.finalize(owner, _taken.discard, stream.cuda_stream)
                return stream
    raise ConfigError(
        f"{IN_TURN} engines on {device} have captured decoding steps, and no more can: let go of "
        "some of them"
    )
