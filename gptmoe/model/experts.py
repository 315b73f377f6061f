"""Expert feed-forward networks over rows sorted by expert: only experts with rows are visited.

Letters: R rows, E local experts, D model width, F feed-forward width, I in, O out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_ROWS = {torch.float32: 4, torch.bfloat16: 2}
"""Rows in the smallest product whose result does not depend on the number of rows (CPU kernels)."""

FEW_ROWS = 64
"""Below this the rows must be a multiple of that: threads get a few each and must not get less."""

BFLOAT16_STEP = 16
"""More rows than this are computed in multiples of it."""


class Experts(nn.Module):
    """Experts `first` to `first + count - 1` of a layer: two linear layers around GELU each."""

    def __init__(self, count: int, d_model: int, d_ff: int, first: int = 0) -> None:
        super().__init__()
        self.first = first
        self.up_weight = nn.Parameter(torch.empty(count, d_ff, d_model))
        self.up_bias = nn.Parameter(torch.empty(count, d_ff))
        self.down_weight = nn.Parameter(torch.empty(count, d_model, d_ff))
        self.down_bias = nn.Parameter(torch.empty(count, d_model))

    @property
    def count(self) -> int:
        """Number of experts held here."""
        return len(self.up_weight)

    def forward(self, rows_RD: Tensor, rows_per_expert: list[int]) -> Tensor:
        """Apply to each row its expert; rows are sorted by expert. Returns [R, D]."""
        hidden_RF = grouped_linear(rows_RD, self.up_weight, self.up_bias, rows_per_expert)
        hidden_RF = F.gelu(hidden_RF, approximate="tanh")
        return grouped_linear(hidden_RF, self.down_weight, self.down_bias, rows_per_expert)


def grouped_linear(
    x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor, rows_per_expert: list[int]
) -> Tensor:
    """y = x W_e^T + b_e for the rows of each expert e, each weight read once. Returns [R, O].

    CUDA in bf16 runs one grouped kernel, which wants rows of whole 16 bytes; elsewhere a loop over
    the experts that have rows.
    """
    weight_EOI, bias_EO = weight_EOI.to(x_RI.dtype), bias_EO.to(x_RI.dtype)
    _, outputs, inputs = weight_EOI.shape
    in_16_bytes = inputs % 8 == 0 and outputs % 8 == 0
    if x_RI.is_cuda and x_RI.dtype == torch.bfloat16 and in_16_bytes:
        return _grouped_kernel(x_RI, weight_EOI, bias_EO, rows_per_expert)
    result: Tensor = _GroupedLinear.apply(  # type: ignore[no-untyped-call]
        x_RI, weight_EOI, bias_EO, rows_per_expert
    )
    return result


def _grouped_kernel(
    x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor, rows_per_expert: list[int]
) -> Tensor:
    counts = torch.tensor(rows_per_expert, device=x_RI.device)
    ends = counts.cumsum(0, dtype=torch.int32)
    y_RO: Tensor = F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=ends)
    return y_RO + bias_EO.repeat_interleave(counts, dim=0, output_size=len(x_RI))


class _GroupedLinear(torch.autograd.Function):
    """The loop, with gradients written straight into one [E, O, I] tensor."""

    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor, rows: list[int]
    ) -> Tensor:
        ctx.save_for_backward(x_RI, weight_EOI)
        ctx.rows = rows
        y_RO = x_RI.new_empty(len(x_RI), weight_EOI.shape[1])
        for expert, start, end in expert_spans(rows):
            _linear_into(y_RO[start:end], x_RI[start:end], weight_EOI[expert], bias_EO[expert])
        return y_RO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        grad_RO = gradients[0].contiguous()
        x_RI, weight_EOI = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x_RI), torch.empty_like(weight_EOI)
        grad_bias = weight_EOI.new_empty(weight_EOI.shape[:2])
        parts = (torch.split(tensor, ctx.rows) for tensor in (grad_RO, x_RI, grad_x))
        for expert, (grad, x, out) in enumerate(zip(*parts, strict=True)):  # no rows: zeros
            torch.sum(grad, 0, out=grad_bias[expert])
            if missing := product_rows(len(x), x.dtype) - len(x):
                grad, x = F.pad(grad, (0, 0, 0, missing)), F.pad(x, (0, 0, 0, missing))
                out.copy_(torch.mm(grad, weight_EOI[expert])[:-missing])
            else:
                torch.mm(grad, weight_EOI[expert], out=out)
            torch.mm(grad.t(), x, out=grad_weight[expert])
        return grad_x, grad_weight, grad_bias, None


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Write x W^T + b to `out`."""
    missing = product_rows(len(x), x.dtype) - len(x)
    if missing:
        out.copy_(F.linear(F.pad(x, (0, 0, 0, missing)), weight, bias)[: len(x)])
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def product_rows(rows: int, dtype: torch.dtype) -> int:
    """With how many rows, the last ones padding, the CPU is to compute a product of `rows` rows.

    In float32 few rows are padded, so that a row's bits do not depend on their number. For bfloat16
    oneDNN compiles and keeps a kernel for each number that it meets, 0.7 ms and 0.7 MB each (here,
    up to 1,024 of them): experts meet any number, so they get powers of two up to 16, then
    multiples of 16, then such that at most a sixteenth is padding.
    """
    if dtype == torch.bfloat16 and rows > BFLOAT16_STEP:
        return rows + -rows % max(BFLOAT16_STEP, 2 ** (rows.bit_length() - 5))
    if dtype == torch.bfloat16 and rows:
        return max(MIN_ROWS[dtype], 2 ** (rows - 1).bit_length())
    return rows + (-rows % MIN_ROWS.get(dtype, 1) if rows < FEW_ROWS else 0)


def expert_spans(rows_per_expert: list[int]) -> list[tuple[int, int, int]]:
    """(expert, first row, last row + 1) of the experts that have rows."""
    spans, start = [], 0
    for expert, count in enumerate(rows_per_expert):
        if count:
            spans.append((expert, start, start + count))
        start += count
    return spans
