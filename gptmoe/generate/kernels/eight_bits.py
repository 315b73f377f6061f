"""Products in bfloat16 with weights in 8 bits, at the speed at which memory is read.

The processor multiplies bytes: x stands there in 16 bits, two bytes, of which the row's largest
number is the last. Sums are of whole numbers, so neither their order nor other rows change a bit.

Letters: R rows, I inputs, O outputs, B blocks of outputs, V vectors, L lanes, Q quads of inputs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import Kernels, Product8, kernels
from .pages import on_huge_pages

VECTORS, LANES, QUAD = 4, 16, 4
"""As in eight_bits.c: vectors of a block of outputs, their outputs, inputs of one instruction."""
ROWS_A_THREAD = 16
"""To take apart fewer rows than these another thread is not worth waking."""


@dataclass(frozen=True, slots=True)
class EightBits:
    """A weight [O, I] of 8-bit values and a scale for each output, for products in bfloat16."""

    values: Tensor
    """int8 [B, Q, V, L, 4]."""
    scales: Tensor
    """float32 [B, V, L]."""
    starts: Tensor
    """int32 [B, V, L]: what takes away that bytes of x have no sign."""
    compiled: Kernels
    task: Product8
    """What is the same in all products."""

    @property
    def num_bytes(self) -> int:
        """What a product with it reads."""
        return self.values.nbytes + self.scales.nbytes + self.starts.nbytes

    def product(self, x: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x W^T + b; x has any leading dimensions."""
        x_RI = x.reshape(-1, x.shape[-1]).contiguous()
        rows, inputs = x_RI.shape
        out_RO = x_RI.new_empty(rows, self.task.outputs)
        low_RI, high_RI = torch.empty(2, rows, inputs, dtype=torch.uint8)
        unit_R = torch.empty(rows)
        task = Product8.from_buffer_copy(self.task)
        task.x, task.out, task.rows = x_RI.data_ptr(), out_RO.data_ptr(), rows
        task.low, task.high = low_RI.data_ptr(), high_RI.data_ptr()
        task.unit = unit_R.data_ptr()
        if bias_O is not None:
            task.bias = bias_O.data_ptr()
        self.compiled.run("halve8", task, most_threads=rows // ROWS_A_THREAD + 1)
        self.compiled.run("product8", task)
        return out_RO if x.dim() == 2 else out_RO.view(*x.shape[:-1], self.task.outputs)


def eight_bits(value_OI: Tensor, scale_O: Tensor) -> EightBits | None:
    """The kernel's form of an int8 weight and its scales; None on a machine without the kernel."""
    compiled = kernels()
    outputs, inputs = value_OI.shape
    if compiled is None or "product8" not in compiled.addresses or inputs % QUAD:
        return None
    missing = -outputs % (VECTORS * LANES)
    value_BVLQ4 = F.pad(value_OI, (0, 0, 0, missing)).view(-1, VECTORS, LANES, inputs // QUAD, QUAD)
    values = value_BVLQ4.permute(0, 3, 1, 2, 4).contiguous()
    scales = F.pad(scale_O.float(), (0, missing)).view(-1, VECTORS, LANES)
    starts = value_BVLQ4.sum((3, 4), dtype=torch.int32) * -128
    on_huge_pages(values.data_ptr(), values.nbytes)
    task = Product8(
        weight=values.data_ptr(),
        scale=scales.data_ptr(),
        start=starts.data_ptr(),
        blocks=len(values),
        quads=inputs // QUAD,
        outputs=outputs,
    )
    return EightBits(values, scales, starts, compiled, task)
