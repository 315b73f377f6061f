"""bfloat16 weights as they lie in a checkpoint, widened to float32 as a product reads them.

For processors without products in bfloat16: oneDNN has none there, and torch's own take twice as
long for one row and ten times as long for a prompt. And for experts that are not copied but stay in
the mapped file, where only those that are asked for take memory.

Letters: R rows, I inputs, O outputs, E experts.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gptmoe.model.layers import ServedWeight

from .library import Kernels, kernels
from .pages import on_huge_pages
from .program import Lend, ProductCall
from .rows import gelu_
from .tasks import Plain
from .workspace import MOST_ROWS

LANES = 32
"""Numbers of the widest instruction."""


class PlainWeight(ServedWeight):
    """A bfloat16 weight [O, I]. A row's bits depend on nothing but the row.

    It shares the memory of what it is made of, unless I must be filled up.
    """

    compiled: Kernels
    task: Plain
    """What is the same in all products."""
    most_rows: ClassVar[int] = MOST_ROWS

    def __new__(cls, weight_OI: Tensor, compiled: Kernels) -> "PlainWeight":
        values = _filled_up(weight_OI.detach())
        self: PlainWeight = super().__new__(cls, values, requires_grad=False)
        return self

    def __init__(self, weight_OI: Tensor, compiled: Kernels) -> None:
        super().__init__()
        self.compiled = compiled
        outputs, inputs = self.shape
        self.task = Plain(weight=self.data_ptr(), outputs=outputs, inputs=inputs)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See ServedWeight.product."""
        x = _filled_up(x)
        out = x.new_empty(*x.shape[:-1], self.task.outputs)
        self.compiled.run("plain_product", self._task(x, out, bias))
        return out

    def activated(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See ServedWeight.activated."""
        return gelu_(self.product(x, bias))

    def calls(self, x: Tensor, out: Tensor, bias_O: Tensor, lend: Lend) -> list[ProductCall]:
        """See Enters."""
        return [("plain_product", self._task(x, out, bias_O))]

    def _task(self, x: Tensor, out: Tensor, bias_O: Tensor | None) -> Plain:
        task = Plain.from_buffer_copy(self.task)
        task.x, task.out, task.end = x.data_ptr(), out.data_ptr(), x.numel() // x.shape[-1]
        if bias_O is not None:
            task.bias = bias_O.data_ptr()
        return task


def plain_weight(weight_OI: Tensor) -> PlainWeight | None:
    """A copy in the memory of the process; None without a C compiler."""
    compiled = kernels()
    if compiled is None:
        return None
    weight = PlainWeight(weight_OI.detach().to(torch.bfloat16, copy=True), compiled)
    on_huge_pages(weight.data_ptr(), weight.nbytes)
    return weight


def kernels_of_mapped(weight_EOI: Tensor) -> Kernels | None:
    """The kernels, if such weights can stay where they are."""
    fits = weight_EOI.dtype == torch.bfloat16 and weight_EOI.shape[-1] % LANES == 0
    return kernels() if fits and weight_EOI.device.type == "cpu" else None


def _filled_up(rows: Tensor) -> Tensor:
    missing = -rows.shape[-1] % LANES
    return F.pad(rows, (0, missing)) if missing else rows.contiguous()
