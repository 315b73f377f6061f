"""One weight in the layout that the CPU's matrix kernels read: oneDNN's, or without it ours.

Letters: R rows, I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptmoe.model.experts import MIN_ROWS
from gptmoe.model.layers import ServedWeight

from .kernels.few_bits import FewBits
from .kernels.few_rows import FewRows, few_rows
from .kernels.library import kernels
from .kernels.pages import on_huge_pages
from .kernels.plain import PlainWeight, plain_weight
from .kernels.program import Enters
from .kernels.rows import gelu_

ROWS_STEP = 4
"""Finer, and there were more kernels; coarser, and 17 sequences would wait for 32."""


class PackedWeight(ServedWeight):
    """A weight [O, I] in the layout of oneDNN, whose products add the bias before they round.

    Products have at least MIN_ROWS rows: then a row's bits do not depend on their number.
    """

    few_rows: FewRows | None

    def __new__(cls, weight_OI: Tensor, dtype: torch.dtype) -> "PackedWeight":
        values = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().to(dtype), None)
        self: PackedWeight = super().__new__(cls, values, requires_grad=False)
        return self

    def __init__(self, weight_OI: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.few_rows = None
        if hasattr(torch.ops.mkldnn, "data_ptr"):
            place, size = torch.ops.mkldnn.data_ptr(self.data), torch.ops.mkldnn._nbytes(self.data)
            on_huge_pages(place, size)
            self.few_rows = few_rows(self.data, weight_OI.shape, self._of_many)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See ServedWeight.product."""
        rows = x.numel() // x.shape[-1]
        if self.few_rows is not None and 0 < rows <= self.few_rows.most_rows:
            return self.few_rows.product(x, bias)
        missing = _kernel_rows(rows, x.dtype) - rows
        if not missing:
            return self._of_many(x, bias)
        y_RO = self._of_many(F.pad(x.flatten(0, -2), (0, 0, 0, missing)), bias)[:rows]
        return y_RO.view(*x.shape[:-1], -1)

    def activated(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See ServedWeight.activated."""
        return gelu_(self.product(x, bias))

    def _of_many(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self, bias, "none", [], "")


def packed_weight(weight_OI: Tensor, dtype: torch.dtype) -> ServedWeight:
    """A weight for products of that type; see `can_pack`."""
    if dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return PackedWeight(weight_OI, dtype)
    weight = plain_weight(weight_OI)
    assert weight is not None
    return weight


def entering(weight: object) -> Enters | None:
    """The same weight, if it can be part of a program."""
    if isinstance(weight, PackedWeight):
        return weight.few_rows if weight.dtype == torch.bfloat16 else None
    return weight if isinstance(weight, PlainWeight | FewBits) else None


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine has kernels for packed weights of that type."""
    if device.type != "cpu" or dtype not in MIN_ROWS or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return True
    return kernels() is not None


def _kernel_rows(rows: int, dtype: torch.dtype) -> int:
    """With how many rows, the last ones padding, oneDNN is to compute a product of `rows` rows.

    It compiles and keeps a kernel for each number that it meets, up to 1,024 in all: prompts and
    experts meet any, and a replica would grow for hours. So multiples of ROWS_STEP, and of many
    rows such that at most a sixteenth is padding.
    """
    if rows <= MIN_ROWS[dtype]:
        return MIN_ROWS[dtype]
    return rows + -rows % max(ROWS_STEP, 2 ** (rows.bit_length() - 5))
