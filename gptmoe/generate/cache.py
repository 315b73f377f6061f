"""Keys and values of past tokens, one slot a sequence.

Letters: L layers, S slots, H heads, C tokens of a segment, K head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptmoe.model.spec import ModelSpec

from .kernels.workspace import Workspace
from .plan import SlotCopy, SlotSpan

FIRST_SEGMENT = 128


@dataclass(frozen=True, slots=True)
class Segment:
    """Keys and values of positions first .. first + size - 1 of every slot, [L, S, H, C, K]."""

    first: int
    size: int
    keys: Tensor
    values: Tensor


class KVCache:
    """Memory for `slots` sequences, in segments that double: 0-127, 128-255, 256-511, 512-1023, ...

    Of all layers and heads of a model, or of consecutive `layers` and one of `slices` of the heads.
    A segment exists once a sequence has reached it, and is read whole: its products have one shape
    and dense operands, however long the sequences are. Who reads it so calls `begin` first:
    positions beyond a sequence's length hold zeros then, since attention gives them a weight of
    exactly 0, and what a damaged sequence has left may be NaN.
    """

    def __init__(
        self,
        spec: ModelSpec,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        layers: range | None = None,
        slices: int = 1,
    ) -> None:
        self.spec = spec
        self.layers = layers or range(spec.num_layers)
        self.num_heads = spec.num_heads // slices
        self.slots = slots
        self.dtype = dtype
        self.device = device
        self.segments: list[Segment] = []
        self.workspace = Workspace()
        self._written = [0] * slots  # positions of each slot that may hold anything but zeros

    def reserve(self, tokens: int) -> int:
        """Make room for sequences of this many tokens; how many segments hold them."""
        ends = segment_ends(self.spec.max_seq_len)
        count = 1 + next(index for index, end in enumerate(ends) if end >= tokens)
        while len(self.segments) < count:
            first = self.segments[-1].first + self.segments[-1].size if self.segments else 0
            size = ends[len(self.segments)] - first
            self.segments.append(Segment(first, size, self._zeros(size), self._zeros(size)))
        return count

    def begin(self, spans: Sequence[SlotSpan]) -> None:
        """Wipe what other sequences have left in these slots behind where the spans start."""
        for span in spans:
            if span.start < self._written[span.slot]:
                self._wipe(span.slot, span.start, self._written[span.slot])
            self._written[span.slot] = span.start + span.count

    def _wipe(self, slot: int, start: int, end: int) -> None:
        for segment in self.segments:
            first, last = max(0, start - segment.first), min(segment.size, end - segment.first)
            if first < last:
                for kept in (segment.keys, segment.values):
                    kept[:, slot, :, first:last] = 0

    @torch.inference_mode()
    def copy(self, copies: Sequence[SlotCopy]) -> None:
        """Copy the beginnings of slots, in this order."""
        for copy in copies:
            self._written[copy.target] = max(self._written[copy.target], copy.count)
            for segment in self.segments:
                size = min(copy.count - segment.first, segment.size)
                if size > 0:
                    for kept in (segment.keys, segment.values):
                        kept[:, copy.target, :, :size] = kept[:, copy.source, :, :size]

    def _zeros(self, size: int) -> Tensor:
        shape = (len(self.layers), self.slots, self.num_heads, size, self.spec.head_dim)
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        # numpy asks the system for zero pages, which cost nothing until written; torch writes all.
        raw = np.zeros(int(np.prod(shape)) * self.dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(raw).view(self.dtype).view(shape)


def segment_ends(max_seq_len: int) -> list[int]:
    """Where the segments of a model's context end; the last is cut to what is needed."""
    ends = [FIRST_SEGMENT]
    while ends[-1] < max_seq_len:
        ends.append(2 * ends[-1])
    ends[-1] = -(-max_seq_len // FIRST_SEGMENT) * FIRST_SEGMENT
    return ends
