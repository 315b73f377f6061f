"""Layer normalisation (in bfloat16) and GELU on a CPU, with the same bits in a program and alone.

Letters: R rows, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptmoe.model.layers import LayerNorm

from .library import Kernels, kernels
from .tasks import Gelu, Norm

LANES = 16
"""Numbers of the widest instruction."""
NUMBERS_A_THREAD = 1 << 15
"""For fewer numbers than these another thread is not worth waking."""
GELUS = {torch.bfloat16: "gelu", torch.float32: "wide_gelu"}


class RowNorm(LayerNorm):
    """A LayerNorm for inference; its kernel takes each row by itself."""

    compiled: Kernels

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        task = norm_task(self, x, out)
        self.compiled.run("norm", task, most_threads=1 + x.numel() // NUMBERS_A_THREAD)
        return out


def use_row_norms(network: nn.Module, d_model: int) -> Kernels | None:
    """Have a bfloat16 network compute its norms so, in place; the kernels, if there are some."""
    compiled = kernels()
    if compiled is None or d_model % LANES:
        return None
    for module in network.modules():
        if type(module) is LayerNorm:
            for name, parameter in module.named_parameters():
                setattr(module, name, nn.Parameter(parameter.detach().float(), requires_grad=False))
            module.__class__ = RowNorm
            assert isinstance(module, RowNorm)
            module.compiled = compiled
    return compiled


def norm_task(
    norm: LayerNorm, x_RD: Tensor, out_RD: Tensor, added_RD: Tensor | None = None
) -> Norm:
    """out = norm(x), or norm(x + added) if `sum` is set to where that is to lie."""
    width = x_RD.shape[-1]
    return Norm(
        x=x_RD.data_ptr(),
        added=None if added_RD is None else added_RD.data_ptr(),
        weight=norm.weight.data_ptr(),
        bias=norm.bias.data_ptr(),
        out=out_RD.data_ptr(),
        rows=x_RD.numel() // width,
        width=width,
    )


def gelu_(x: Tensor) -> Tensor:
    """GELU (tanh form), in place where there is a kernel for it.

    torch's own gives the last numbers of each thread's share other bits than the others.
    """
    kernel, compiled = GELUS.get(x.dtype), kernels()
    if kernel is None or compiled is None or not x.is_contiguous():
        return F.gelu(x, approximate="tanh")
    task = Gelu(x=x.data_ptr(), count=x.numel())
    compiled.run(kernel, task, most_threads=1 + x.numel() // NUMBERS_A_THREAD)
    return x
