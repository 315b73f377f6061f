"""Keys and values of past tokens, one slot a sequence.

Letters: L layers, S slots, H heads, C capacity in tokens, K head width.
"""

import numpy as np
import torch
from torch import Tensor

from gptmoe.model.spec import ModelSpec

BLOCK_TOKENS = 128
"""Attention reads keys in whole blocks of this many tokens."""


class KVCache:
    """Zeroed memory of [S, H, C, K] for keys and values of each layer; on a CPU touched when used.

    Rows beyond a sequence's length hold stale but finite numbers: attention gives them a weight of
    exactly 0.
    """

    def __init__(
        self,
        spec: ModelSpec,
        slots: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        capacity = -(-max_seq_len // BLOCK_TOKENS) * BLOCK_TOKENS
        shape = (slots, spec.num_heads, capacity, spec.head_dim)
        self.keys = [_zeros(shape, dtype, device) for _ in range(spec.num_layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(spec.num_layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zero pages, which cost nothing until they are written; torch writes
    # them all.
    size = torch.empty((), dtype=dtype).element_size()
    raw = np.zeros(int(np.prod(shape)) * size, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
