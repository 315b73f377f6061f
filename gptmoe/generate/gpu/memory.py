"""A GPU that is full, in a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gptmoe.errors import ConfigError


@contextmanager
def full(what: str, device: torch.device) -> Iterator[None]:
    """Turn torch's error in the block into a ConfigError that says what did not fit."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"{what} did not fit into what is left of the memory of {device}; lower "
            "engine.kv_tokens or engine.max_batch_size, or take a larger GPU (newer weights stand "
            "beside the old ones for a while)"
        ) from None
