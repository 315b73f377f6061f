"""Weights in bfloat16 on a processor that cannot multiply it: widened to float32 as they are read.

oneDNN has no products in bfloat16 without AVX512, and torch's own take ten times as long as these
for a prompt. Letters: R rows, I inputs, O outputs, B blocks of outputs, P pairs of inputs.
"""

import torch.nn.functional as F
from torch import Tensor

from gptmoe.model.layers import ServedWeight

from .library import Kernels, Product, kernels
from .pages import on_huge_pages

BLOCK = 64
"""Outputs that stand together."""
KERNEL = "widened_product"


class WidenedWeight(ServedWeight):
    """A weight [O, I], packed as [B, P, 64, 2]. A row's bits depend on nothing but the row."""

    compiled: Kernels
    task: Product
    """What is the same in all products."""

    def __new__(cls, weight_OI: Tensor, compiled: Kernels) -> "WidenedWeight":
        outputs, inputs = weight_OI.shape
        padded_OI = F.pad(weight_OI.detach().bfloat16(), (0, inputs % 2, 0, -outputs % BLOCK))
        values = padded_OI.unflatten(1, (-1, 2)).unflatten(0, (-1, BLOCK)).transpose(1, 2)
        self: WidenedWeight = super().__new__(cls, values.contiguous(), requires_grad=False)
        return self

    def __init__(self, weight_OI: Tensor, compiled: Kernels) -> None:
        super().__init__()
        self.compiled = compiled
        self.task = Product(
            weight=self.data_ptr(), blocks=len(self), pairs=self.shape[1], outputs=len(weight_OI)
        )
        on_huge_pages(self.data_ptr(), self.nbytes)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See ServedWeight.product."""
        x = F.pad(x, (0, 1)) if x.shape[-1] % 2 else x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.task.outputs)
        task = Product.from_buffer_copy(self.task)
        task.x, task.out, task.rows = x.data_ptr(), out.data_ptr(), x.numel() // x.shape[-1]
        if bias is not None:
            task.bias = bias.data_ptr()
        self.compiled.run(KERNEL, task)
        return out


def widening() -> Kernels | None:
    """The kernels, if there is one for such weights."""
    compiled = kernels()
    return compiled if compiled is not None and KERNEL in compiled.addresses else None
