"""What lies between the kernels of a layer, and is used again in each layer and step."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

MOST_ROWS = 32
"""Of a layer that runs as one program: with more its products take long, and what is between them
little."""


class Workspace:
    """Memory and programs of one cache, whose steps run one at a time."""

    def __init__(self) -> None:
        self.programs: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
        """Of each layer."""
        self.experts: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
        """What the programs of a layer with experts share."""
        self._memory: dict[tuple[str, int], Tensor] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def lend(self, name: str, rows: int, width: int) -> Tensor:
        """Memory in bfloat16, [rows, width]; under one name and width it is the same for all."""
        key = name, width
        if key not in self._memory:
            self._memory[key] = torch.empty(MOST_ROWS, width, dtype=torch.bfloat16)
        return self._memory[key][:rows]

    def scratch(self, num_bytes: int) -> Tensor:
        """The same memory for all, [at least num_bytes] uint8; whoever got less before keeps it."""
        if len(self._scratch) < num_bytes:
            self._scratch = torch.empty(2 * num_bytes, dtype=torch.uint8)
        return self._scratch
