"""Products in bfloat16 with weights in 8 or 4 bits, at the speed at which memory is read.

The processor multiplies bytes: x stands there in 16 bits, two bytes, of which the row's largest
number is the last. Sums within a group of inputs are of whole numbers, groups are added in order:
neither threads nor other rows change a bit.

Letters: R rows, I inputs, O outputs, B blocks of outputs, V vectors, L lanes, Q quads of inputs,
G groups of inputs.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tasks
from .library import Kernels, kernels
from .pages import on_huge_pages
from .program import Lend, ProductCall
from .workspace import MOST_ROWS

VECTORS, LANES, QUAD = 4, 16, 4
"""As in few_bits.c: vectors of a block of outputs, their outputs, inputs of one instruction."""
ROWS_A_THREAD = 16
"""To take apart fewer rows than these another thread is not worth waking."""


@dataclass(frozen=True, slots=True)
class FewBits:
    """A weight [O, I] in few bits and a scale for each output and group of inputs."""

    values: Tensor
    """uint8, 8 bits: [B, Q, V, L, 4]; 4 bits: [B, Q / 2, V, L, 4], two quads a byte."""
    scales: Tensor
    """bfloat16 [B, G, V, L]."""
    compiled: Kernels
    kernel: str
    task: tasks.FewBits
    """What is the same in all products."""
    most_rows: ClassVar[int] = MOST_ROWS

    @property
    def num_bytes(self) -> int:
        """What a product with it reads."""
        return self.values.nbytes + self.scales.nbytes

    def product(self, x: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x W^T + b; x has any leading dimensions."""
        x, outputs = x.contiguous(), self.task.outputs
        out = x.new_empty(*x.shape[:-1], outputs)
        scratch = torch.empty(self._scratch_bytes(x), dtype=torch.uint8)
        task = self._task(x, out, bias_O, scratch)
        self.compiled.run("halve", task, most_threads=1 + task.end // ROWS_A_THREAD)
        self.compiled.run(self.kernel, task)
        return out

    def calls(self, x: Tensor, out: Tensor, bias_O: Tensor, lend: Lend) -> list[ProductCall]:
        """See Enters."""
        task = self._task(x, out, bias_O, lend(self._scratch_bytes(x)))
        return [("halve", task), (self.kernel, tasks.FewBits.from_buffer_copy(task))]

    def _scratch_bytes(self, x: Tensor) -> int:
        rows = x.numel() // x.shape[-1]
        return 2 * x.numel() + 8 * rows * (self.task.quads // self.task.group) + 4 * rows

    def _task(
        self, x: Tensor, out: Tensor, bias_O: Tensor | None, scratch: Tensor
    ) -> tasks.FewBits:
        """x is taken apart in `scratch`: its halves, their sums, each row's unit."""
        task = tasks.FewBits.from_buffer_copy(self.task)
        rows, low = x.numel() // x.shape[-1], scratch.data_ptr()
        task.x, task.out, task.end = x.data_ptr(), out.data_ptr(), rows
        sums = low + 2 * x.numel()
        task.low, task.high, task.sums = low, low + x.numel(), sums
        task.unit = sums + 8 * rows * (self.task.quads // self.task.group)
        if bias_O is not None:
            task.bias = bias_O.data_ptr()
        return task


def few_bits(value_OI: Tensor, scale_OG: Tensor, bits: int) -> FewBits | None:
    """The kernel's form of whole numbers (-127..127 or -8..7) and of their scales.

    None on a machine without the kernel.
    """
    compiled, kernel = kernels(), f"product{bits}"
    outputs, inputs = value_OI.shape
    group = inputs // scale_OG.shape[1]
    if compiled is None or kernel not in compiled.addresses or group % (QUAD * 8 // bits):
        return None
    missing = -outputs % (VECTORS * LANES)
    moved_OI = (value_OI.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    moved_BVLQ4 = F.pad(moved_OI, (0, 0, 0, missing)).view(-1, VECTORS, LANES, inputs // QUAD, QUAD)
    values = moved_BVLQ4.permute(0, 3, 1, 2, 4)
    if bits == 4:
        values = values[:, ::2] | values[:, 1::2] << 4
    values = values.contiguous()
    scale_BVLG = F.pad(scale_OG.bfloat16(), (0, 0, 0, missing)).view(
        -1, VECTORS, LANES, inputs // group
    )
    scales = scale_BVLG.permute(0, 3, 1, 2).contiguous()
    on_huge_pages(values.data_ptr(), values.nbytes)
    task = tasks.FewBits(
        weight=values.data_ptr(),
        scale=scales.data_ptr(),
        blocks=len(values),
        quads=inputs // QUAD,
        group=group // QUAD,
        outputs=outputs,
    )
    return FewBits(values, scales, compiled, kernel, task)
