"""Keys and values of past tokens in pages on a GPU.

Letters: L layers, P pages, H heads, B tokens of a block (a page), K head width, S slots, X pages a
slot may have.
"""

import math
from collections.abc import Sequence

import torch

from gptmoe.generate.plan import SlotCopy, SlotSpan, SlotTrim
from gptmoe.generate.slots import BLOCK, blocks_of
from gptmoe.model.spec import ModelSpec

from .memory import full
from .pages import NOWHERE, PageTable


class PagedCache:
    """Memory for `blocks` blocks, shared by `slots` sequences; `idle` is a slot for padding.

    Raises ConfigError if there is not so much.
    """

    def __init__(
        self, spec: ModelSpec, slots: int, blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.spec, self.device = spec, device
        self.table = PageTable(slots, blocks)
        self.idle = slots
        shape = (spec.num_layers, self.table.num_pages, spec.num_heads, BLOCK, spec.head_dim)
        gigabytes = 2 * math.prod(shape) * dtype.itemsize / 1e9
        with full(f"a KV cache of {blocks * BLOCK} tokens ({gigabytes:.1f} GB)", device):
            self.keys, self.values = (
                torch.empty(shape, dtype=dtype, device=device) for _ in range(2)
            )
        self.table_SX = torch.full(
            (slots + 1, blocks_of(spec.max_seq_len)), NOWHERE, dtype=torch.int32, device=device
        )
        """The pages of each slot, for the kernels; always the same memory."""
        self._told: list[list[int]] = [[] for _ in range(slots)]

    def begin(
        self, copies: Sequence[SlotCopy], trims: Sequence[SlotTrim], spans: Sequence[SlotSpan]
    ) -> None:
        """Make room for a step; see PageTable.begin."""
        for source, target in self.table.begin(copies, trims, spans):
            for kept in (self.keys, self.values):
                kept[:, target] = kept[:, source]
        for slot in {span.slot for span in spans}:
            pages = list(self.table.pages(slot))
            if pages != self._told[slot]:
                self._told[slot] = pages
                self.table_SX[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
