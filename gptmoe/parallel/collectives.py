"""Collectives that gradients flow through, in the pairs that tensor parallelism needs.

Hidden states are [B, T, D]; slices of a sequence lie along T, in rank order. Each function is
collective over its group.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Renamed in torch 2.13, which warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def sum_forward(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the group; the gradient of each part is the gradient of the sum."""
    result: Tensor = _SumForward.apply(x, group)  # type: ignore[no-untyped-call]
    return result


def sum_backward(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same values; their gradients are summed over the group."""
    result: Tensor = _SumBackward.apply(x, group)  # type: ignore[no-untyped-call]
    return result


def gather(x_BTD: Tensor, group: dist.ProcessGroup, count: int) -> Tensor:
    """The `count` ranks' slices of the sequences in one; gradients are summed and cut up again."""
    result: Tensor = _Gather.apply(x_BTD, group, count)  # type: ignore[no-untyped-call]
    return result


def reduce_scatter(x_BTD: Tensor, group: dist.ProcessGroup, count: int) -> Tensor:
    """This rank's slice of the sum over the group of `count`; gradients are gathered."""
    result: Tensor = _ReduceScatter.apply(x_BTD, group, count)  # type: ignore[no-untyped-call]
    return result


def take_slice(x_BTD: Tensor, index: int, count: int) -> Tensor:
    """Part `index` of `count` of the sequences; the gradient is zero elsewhere."""
    return x_BTD.chunk(count, 1)[index]


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, group: Any, count: int) -> Tensor:
        ctx.group, ctx.count = group, count
        return _gathered(x_BTD, group, count)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _scattered(gradients[0], ctx.group, ctx.count), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, group: Any, count: int) -> Tensor:
        ctx.group, ctx.count = group, count
        return _scattered(x_BTD, group, count)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(gradients[0], ctx.group, ctx.count), None, None


def gather_rows(rows: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all ranks, `sizes` each, in rank order. Without a gradient of its own."""
    if group is None:
        return rows
    most = max(sizes)  # the collective wants as many of each
    out = rows.new_empty(most * len(sizes), *rows.shape[1:])
    _all_gather(out, _padded(rows, most), group=group)
    if min(sizes) == most:
        return out
    return torch.cat([part[:size] for part, size in zip(out.split(most), sizes, strict=True)])


def scatter_rows(
    x: Tensor, sizes: Sequence[int], index: int, group: dist.ProcessGroup | None
) -> Tensor:
    """The rows of rank `index`, this one, of the sum over the group; rank i gets `sizes[i]`."""
    if group is None:
        return x
    most = max(sizes)
    if min(sizes) < most:
        x = torch.cat([_padded(part, most) for part in x.split(list(sizes))])
    out = x.new_empty(most, *x.shape[1:])
    _reduce_scatter(out, x.contiguous(), group=group)
    return out[: sizes[index]]


def _padded(rows: Tensor, count: int) -> Tensor:
    if len(rows) == count:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def _summed(x: Tensor, group: Any) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _gathered(x_BTD: Tensor, group: Any, count: int) -> Tensor:
    """The collectives join along dimension 0: T comes first for them."""
    x_TBD = x_BTD.transpose(0, 1).contiguous()
    out_TBD = x_TBD.new_empty(len(x_TBD) * count, *x_TBD.shape[1:])
    _all_gather(out_TBD, x_TBD, group=group)
    return out_TBD.transpose(0, 1)


def _scattered(x_BTD: Tensor, group: Any, count: int) -> Tensor:
    x_TBD = x_BTD.transpose(0, 1).contiguous()
    out_TBD = x_TBD.new_empty(len(x_TBD) // count, *x_TBD.shape[1:])
    _reduce_scatter(out_TBD, x_TBD, group=group)
    return out_TBD.transpose(0, 1)
