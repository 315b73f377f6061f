"""Products of one or two rows with a packed weight, at the speed at which memory is read.

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

from .on_threads import kernels

LANES = 64
"""Outputs of a block in oneDNN's layout."""
MOST_ROWS = 2
CHUNKS = (512, 1024)
"""Inputs that oneDNN sums up by themselves; it takes longer chunks for longer sums."""

log = logging.getLogger(__name__)

Product = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class FewRows:
    """A packed bfloat16 weight [O, I] for products of few rows."""

    values: Tensor
    """Packed; owns the memory."""
    outputs: int
    inputs: int
    chunk: int

    def product(self, x_RI: Tensor, bias_O: Tensor | None) -> Tensor:
        """x W^T + b, [R, O]; bfloat16, contiguous."""
        compiled = kernels()
        assert compiled is not None
        out_RO = x_RI.new_empty(len(x_RI), self.outputs)
        task = (
            torch.ops.mkldnn.data_ptr(self.values),
            x_RI.data_ptr(),
            0 if bias_O is None else bias_O.data_ptr(),
            out_RO.data_ptr(),
            0,
            -(-self.outputs // LANES),
            self.inputs // 2,
            self.chunk // 2,
            self.outputs,
            len(x_RI),
        )
        compiled.run(compiled.compiled.product.address, task, counter=4)
        return out_RO


def few_rows(values: Tensor, shape: Sequence[int], packed_product: Product) -> FewRows | None:
    """The kernel for a packed weight, or None if it would not give `packed_product`'s bits."""
    outputs, inputs = shape
    if kernels() is None or values.dtype != torch.bfloat16 or inputs % 2:
        return None
    padded = outputs + -outputs % LANES
    if torch.ops.mkldnn._nbytes(values) != padded * inputs * values.dtype.itemsize:
        return None
    numbers = torch.Generator().manual_seed(inputs)
    x_RI = torch.randn(MOST_ROWS, inputs, generator=numbers).bfloat16()
    # Results that nearly cancel against the bias show the last bits of the sums before it.
    bias_O = -packed_product(x_RI, None)[0]
    expected_RO = packed_product(x_RI, bias_O)
    for chunk in sorted(CHUNKS, reverse=inputs > CHUNKS[-1]):
        found = FewRows(values, outputs, inputs, chunk)
        if torch.equal(found.product(x_RI, bias_O), expected_RO):
            return found
    log.debug("no kernel for few rows with the bits of oneDNN for [%d, %d]", outputs, inputs)
    return None
