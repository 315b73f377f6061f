"""Products of few rows with a packed weight, at the speed at which memory is read.

oneDNN's kernels reach about two thirds of it with so few rows, which is what decoding asks for.
This kernel reads the same packed memory and gives the same bits: each weight is tried when it is
packed, and where one bit differs (another machine, another layout) oneDNN computes it as before.

Letters: R rows, I inputs, O outputs.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptmoe.model.experts import MIN_ROWS

from .library import Kernels, kernels
from .program import Lend, ProductCall
from .tasks import Product

BLOCK = 64
"""Outputs that oneDNN packs together."""
MOST_ROWS = {torch.bfloat16: 8, torch.float32: 3}
"""With more oneDNN is as fast."""
KERNELS = {torch.bfloat16: ("product", 2), torch.float32: ("wide_product", 1)}
"""What computes in a type, and the inputs that it takes in one step."""
CHUNKS = (512, 1024)
"""Inputs that oneDNN sums up by themselves; it takes longer chunks for longer sums."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FewRows:
    """A packed weight [O, I] for products of few rows."""

    values: Tensor
    """Packed; owns the memory."""
    compiled: Kernels
    kernel: str
    task: Product
    """What is the same in all products."""

    @property
    def most_rows(self) -> int:
        """Of a product."""
        return MOST_ROWS[self.values.dtype]

    def product(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """x W^T + b in the weight's type; x has any leading dimensions."""
        x, outputs = x.contiguous(), self.task.outputs
        out = x.new_empty(*x.shape[:-1], outputs)
        self.compiled.run(self.kernel, self._task(x, out, bias_O))
        return out

    def calls(self, x: Tensor, out: Tensor, bias_O: Tensor, lend: Lend) -> list[ProductCall]:
        """See Enters."""
        return [(self.kernel, self._task(x, out, bias_O))]

    def _task(self, x: Tensor, out: Tensor, bias_O: Tensor | None) -> Product:
        task = Product.from_buffer_copy(self.task)
        task.x, task.out, task.end = x.data_ptr(), out.data_ptr(), x.numel() // x.shape[-1]
        if bias_O is not None:
            task.bias = bias_O.data_ptr()
        return task


def few_rows(
    values: Tensor, shape: Sequence[int], packed_product: Callable[[Tensor, Tensor | None], Tensor]
) -> FewRows | None:
    """The kernel for a packed weight, or None if it would not give `packed_product`'s bits."""
    outputs, inputs = shape
    kernel, step = KERNELS[values.dtype]
    compiled = kernels()
    if compiled is None or kernel not in compiled.addresses or inputs % step:
        return None
    padded = outputs + -outputs % BLOCK
    if torch.ops.mkldnn._nbytes(values) != padded * inputs * values.dtype.itemsize:
        return None
    numbers = torch.Generator().manual_seed(inputs)
    x_RI = torch.randn(MIN_ROWS[values.dtype], inputs, generator=numbers).to(values.dtype)
    # Results that nearly cancel against the bias show the last bits of the sums before it.
    bias_O = -packed_product(x_RI, None)[0]
    expected_RO = packed_product(x_RI, bias_O)
    for chunk in sorted(CHUNKS, reverse=inputs > CHUNKS[-1]):
        task = Product(
            weight=torch.ops.mkldnn.data_ptr(values),
            blocks=padded // BLOCK,
            steps=inputs // step,
            chunk=chunk // step,
            outputs=outputs,
        )
        found = FewRows(values, compiled, kernel, task)
        if torch.equal(found.product(x_RI, bias_O), expected_RO):
            return found
    log.debug("no kernel for few rows with the bits of oneDNN for [%d, %d]", outputs, inputs)
    return None
