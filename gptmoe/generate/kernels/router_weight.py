"""What routers decide by, in float32: oneDNN takes ten times as long for a few rows and outputs.

Each row's sums are in the same order among any number of rows.

Letters: R rows, E outputs (experts), D inputs.
"""

import torch
from torch import Tensor

from gptmoe.model.layers import ServedWeight

from .library import Kernels, kernels
from .tasks import Scores

LANES = 16
"""Inputs of the widest instruction."""
ROWS_A_THREAD = 16
"""For fewer rows than these another thread is not worth waking."""


class RouterWeight(ServedWeight):
    """A weight [E, D] for products in float32."""

    compiled: Kernels

    def __new__(cls, weight_ED: Tensor, compiled: Kernels) -> "RouterWeight":
        values = weight_ED.detach().float().contiguous()
        self: RouterWeight = super().__new__(cls, values, requires_grad=False)
        return self

    def __init__(self, weight_ED: Tensor, compiled: Kernels) -> None:
        super().__init__()
        self.compiled = compiled

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See ServedWeight.product."""
        outputs, inputs = self.shape
        x_RD = x.reshape(-1, inputs).contiguous()
        out_RE = x.new_empty(*x.shape[:-1], outputs)
        task = self.task(x_RD, out_RE)
        self.compiled.run("scores", task, most_threads=1 + len(x_RD) // ROWS_A_THREAD)
        return out_RE if bias is None else out_RE.add_(bias)

    def task(self, x_RD: Tensor, out_RE: Tensor) -> Scores:
        """What the kernel is told; x in float32, or bfloat16 that it widens."""
        outputs, inputs = self.shape
        task = Scores(weight=self.data_ptr(), out=out_RE.data_ptr())
        task.rows, task.outputs, task.inputs = len(x_RD), outputs, inputs
        setattr(task, "half" if x_RD.dtype == torch.bfloat16 else "x", x_RD.data_ptr())
        return task


def router_weight(weight_ED: Tensor) -> RouterWeight | None:
    """The kernel's form of a router's weight; None where there is no kernel for it."""
    compiled = kernels()
    if compiled is None or weight_ED.shape[1] % LANES:
        return None
    return RouterWeight(weight_ED, compiled)
