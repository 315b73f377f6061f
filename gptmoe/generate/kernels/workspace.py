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
        self.programs: WeakKeyDictionary[nn.Module, dict[int, Any]] = WeakKeyDictionary()
        """Of each layer, by its rows."""
        self._memory: dict[tuple[str, int], Tensor] = {}

    def lend(self, name: str, rows: int, width: int) -> Tensor:
        """Memory in bfloat16, [rows, width]; under one name and width it is the same for all."""
        key = name, width
        if key not in self._memory:
            self._memory[key] = torch.empty(MOST_ROWS, width, dtype=torch.bfloat16)
        return self._memory[key][:rows]
