"""From gradients to new weights: reduce, norm, clip, step, state. The plain torch one (ZeRO 0).

Gradient rule. Each rank divides its loss by *global* counts, so the gradient of the global loss is
the sum of the ranks' gradients. A replicated parameter is summed over all ranks. An expert's rows
came from its whole expert group, and the backward all-to-all has summed over that group, so it is
summed over its replicas only. The norm counts each parameter once: replicated ones on any rank,
expert shards over the expert group.
"""

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

    def step(self, learning_rate: float) -> float:
        """Use the gradients in `.grad`, clear them, and return their norm before clipping."""
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

    def step(self, learning_rate: float) -> float:
        """Reduce, clip, update; see Updater.step."""
        for o in self.owned:
            if o.parameter.grad is None:
                o.parameter.grad = torch.zeros_like(o.parameter)
        replicated, experts = self._gradients(is_expert=False), self._gradients(is_expert=True)
        sum_over(replicated, self.mesh.world_group)
        sum_over(experts, self.mesh.replica_group)
        norm = global_norm(replicated, experts, self.mesh.expert_group)
        clip(replicated + experts, norm, self.spec.max_grad_norm)
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
        if self.spec.kind == "adamw":
            for o in self.owned:
                self.optimizer.state[o.parameter] = {
                    "step": read(f"step/{o.name}", Box((), ())).to(
                        o.parameter.device, torch.float32
                    ),
                    **{name: read(f"{name}/{o.name}", o.box).to(o.parameter) for name in MOMENTS},
                }

    def _gradients(self, *, is_expert: bool) -> list[Tensor]:
        gradients = (o.parameter.grad for o in self.owned if o.is_expert == is_expert)
        return [gradient for gradient in gradients if gradient is not None]


MOMENTS = ("exp_avg", "exp_avg_sq")


def moment_pieces(owned: Owned, state: dict[str, Tensor]) -> Iterable[Piece]:
    """AdamW's state of a parameter as boxes of `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME`."""
    for name in MOMENTS:
        if name in state:
            yield Piece(f"{name}/{owned.name}", owned.full_shape, owned.box, state[name])
    if "step" in state and not any(owned.box.start):
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


def sum_over(gradients: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum the gradients over a group in place, a bucket of many small ones at a time."""
    if group is None:
        return
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat, group=group)
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def global_norm(
    replicated: Sequence[Tensor], experts: Sequence[Tensor], expert_group: dist.ProcessGroup | None
) -> float:
    """Euclidean norm over all parameters of the model, each counted once."""
    device = replicated[0].device
    squares = torch.stack([sum_of_squares(replicated, device), sum_of_squares(experts, device)])
    if expert_group is not None:
        shard = squares[1:].clone()
        dist.all_reduce(shard, group=expert_group)
        squares[1:] = shard
    return float(squares.sum().sqrt())


def clip(gradients: Sequence[Tensor], norm: float, max_norm: float) -> None:
    """Scale the gradients in place so that their norm is at most `max_norm`; 0 = leave them."""
    if 0 < max_norm < norm:
        torch._foreach_mul_(list(gradients), max_norm / norm)


def sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of the squares of all elements, in float64.

    Row by row, since a float32 norm on the CPU loses 0.2 % of a tensor of 50 million elements; all
    in float64 it would take 27 times as long.
    """
    rows = [part for tensor in tensors for part in _rows(tensor.flatten())]
    norms = [torch.linalg.vector_norm(part, dim=1) for part in rows]
    return torch.cat([torch.zeros(1, device=device), *norms]).double().square().sum()


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
