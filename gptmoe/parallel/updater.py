"""From gradients to new weights: reduce, norm, clip, step, state. The plain torch one (ZeRO 0, 3).

The gradient rules. Each rank divides its loss by *global* counts, so that the gradient of the
global loss L = sum_d L_d over data ranks d is the sum of theirs; nothing is averaged again. For a
parameter w and the ranks that hold the same boxes of it:

1. Slices (tp). The ranks of a tensor group compute one L_d together. A sliced parameter gets all of
   dL_d/dw where it lives: the collectives around sliced products see to it. So does one that every
   rank applies to everything. One that each applies to its part of the rows (with sequence
   parallelism all but the sliced ones; routers; see cuts.py) gets a part: sum over the tensor
   group. The balance losses are computed by each rank of the group from all rows: each takes 1/tp
   of their gradient, so that the same sum is right for them.
2. Stages (pp). A parameter lives on one stage, but for the token table, which is the head, too:
   dL/dw = dL/dw_first + dL/dw_last, summed over these two.
3. Samples (dp). Sum over the data group. An expert's rows have come from its whole expert group,
   and the backward all-to-all has summed over that: sum over its replicas only. Rows shared by
   ZeRO 3 come summed from the backward pass (shards.py).

The norm counts each parameter once: of all ranks that hold a box one speaks for it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gptmoe.checkpoint.boxes import Box, Piece
from gptmoe.model.transformer import GPT

from .mesh import Mesh
from .optimizer import OptimizerSpec
from .ownership import Owned, owned_parameters

BUCKET_BYTES = 32 * 2**20
ROW_ELEMENTS = 4096

Read = Callable[[str, Box], Tensor]
"""Reads a box of a logical tensor of the checkpoint's optimizer group."""


class Updater(Protocol):
    """Owns the optimizer. Collective: each rank calls the same methods in the same order."""

    def microbatch_done(self, *, last: bool) -> None:
        """After each backward pass: gradients may be reduced and cut up now to save memory."""
        ...

    def step(self, learning_rate: float, loss_scale: float = 1.0) -> float:
        """Use the gradients in `.grad`, clear them, and return their norm before clipping.

        The gradients are those of the loss times `loss_scale`; the norm is that of the loss's own.
        If it is not finite nothing is updated.
        """
        ...

    def state_pieces(self) -> list[Piece]:
        """The part of the optimizer's state that this rank writes to a checkpoint."""
        ...

    def load_state(self, read: Read) -> None:
        """Take the state from a checkpoint, whatever layout wrote it."""
        ...


class PlainUpdater:
    """All optimizer state on every rank that holds the parameter."""

    def __init__(self, model: GPT, mesh: Mesh, spec: OptimizerSpec) -> None:
        self.mesh = mesh
        self.spec = spec
        self.owned = owned_parameters(model, mesh.layout, mesh.rank)
        self.optimizer = make_optimizer(parameter_groups(self.owned, spec), spec)

    def microbatch_done(self, *, last: bool) -> None:
        """Gradients are added up and reduced at the end."""

    def step(self, learning_rate: float, loss_scale: float = 1.0) -> float:
        """Reduce, clip, update; see Updater.step."""
        complete_gradients(self.owned, self.mesh)
        dense = [o for o in self.owned if not (o.cut.is_expert or o.cut.is_sharded)]
        sum_over(gradients(dense), self.mesh.data_group)
        sum_over(gradients(o for o in self.owned if o.cut.is_expert), self.mesh.replica_group)
        spoken_for = gradients(o for o in self.owned if o.writes)
        norm = global_norm(spoken_for, self.mesh) / loss_scale
        if math.isfinite(norm):
            rescale(gradients(self.owned), norm, self.spec.max_grad_norm, loss_scale)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state_pieces(self) -> list[Piece]:
        """Moments and step count of each parameter that this rank writes."""
        return [
            piece
            for o in self.owned
            if o.writes and o.parameter in self.optimizer.state
            for piece in moment_pieces(o, self.optimizer.state[o.parameter])
        ]

    def load_state(self, read: Read) -> None:
        """Fill moments and step counts."""
        if self.spec.kind != "adamw":
            return
        for o in self.owned:
            state = {"step": read(f"step/{o.name}", Box((), ())).to(o.parameter.device).float()}
            for name in MOMENTS:
                state[name] = torch.empty_like(o.parameter)
                for box, part in o.parts(state[name]):
                    part.copy_(read(f"{name}/{o.name}", box))
            self.optimizer.state[o.parameter] = state


MOMENTS = ("exp_avg", "exp_avg_sq")


def moment_pieces(owned: Owned, state: dict[str, Tensor]) -> Iterable[Piece]:
    """AdamW's state of a parameter as boxes of `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME`."""
    for name in MOMENTS:
        if name in state:
            yield from owned.pieces(f"{name}/{owned.name}", state[name])
    if "step" in state and not any(owned.cut.boxes[0].start):
        yield Piece(f"step/{owned.name}", (), Box((), ()), state["step"].detach().float().cpu())


def parameter_groups(owned: Sequence[Owned], spec: OptimizerSpec) -> list[dict[str, object]]:
    """Parameters with and without weight decay: norms and biases are not decayed."""

    def decays(o: Owned) -> bool:
        return not o.name.endswith("bias") and len(o.full_shape) > 1

    return [
        {"params": [o.parameter for o in owned if decays(o)], "weight_decay": spec.weight_decay},
        {"params": [o.parameter for o in owned if not decays(o)], "weight_decay": 0.0},
    ]


def make_optimizer(groups: list[dict[str, object]], spec: OptimizerSpec) -> torch.optim.Optimizer:
    """The torch optimizer; its learning rate is set at each step."""
    if spec.kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0)
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(spec.beta1, spec.beta2), eps=spec.eps, fused=True
    )


def complete_gradients(owned: Sequence[Owned], mesh: Mesh) -> None:
    """Rules 1 and 2: afterwards each gradient is that of all slices and stages for its samples."""
    for o in owned:
        if o.parameter.grad is None:  # left out on one rank, it would leave the others waiting
            o.parameter.grad = torch.zeros_like(o.parameter)
    sum_over(gradients(o for o in owned if o.cut.is_partial), mesh.tensor_group)
    sum_over(gradients(o for o in owned if o.cut.is_tied), mesh.tied_group)


def gradients(owned: Iterable[Owned]) -> list[Tensor]:
    """The gradients that are there."""
    return [o.parameter.grad for o in owned if o.parameter.grad is not None]


def sum_over(gradients: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum the gradients over a group in place, a bucket of many small ones at a time."""
    if group is None:
        return
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat, group=group)
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def global_norm(spoken_for: Sequence[Tensor], mesh: Mesh) -> float:
    """Euclidean norm over the model, of the gradients that each rank speaks for. Collective."""
    total = sum_of_squares(spoken_for)
    if mesh.world_group is not None:
        dist.all_reduce(total, group=mesh.world_group)
    return float(total.sqrt())


def rescale(
    gradients: Sequence[Tensor], norm: float, max_norm: float, loss_scale: float = 1.0
) -> None:
    """Take the loss scale out of the gradients and clip their norm to `max_norm`, in place.

    `norm` is that without the scale; max_norm 0 = no clipping.
    """
    factor = max_norm / norm if 0 < max_norm < norm else 1.0
    if factor != 1.0 or loss_scale != 1.0:
        torch._foreach_mul_(list(gradients), factor / loss_scale)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements, in float64.

    Row by row, since a float32 norm on the CPU loses 0.2 % of a tensor of 50 million elements; all
    in float64 it would take 27 times as long.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    rows = [part for tensor in tensors for part in _rows(tensor.flatten())]
    norms = [torch.linalg.vector_norm(part, dim=1).to(rows[0].device) for part in rows]
    return torch.cat(norms).double().square().sum()


def _rows(flat: Tensor) -> tuple[Tensor, Tensor]:
    whole = len(flat) // ROW_ELEMENTS * ROW_ELEMENTS
    return flat[:whole].view(-1, ROW_ELEMENTS), flat[whole:].view(1, -1)


def _buckets(tensors: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
