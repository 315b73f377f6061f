"""Runs a pipeline schedule on this rank's stage; one stage alone is the simplest case.

Letters: B sequences, T tokens, D model width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gptmoe.model.transformer import GPT

from .mesh import Mesh
from .schedules import Action


class Passes(Protocol):
    """What a microbatch goes through; the pipeline decides when, and brings hidden states."""

    def shape(self, microbatch: int) -> tuple[int, int]:
        """Its sequences, and tokens of each."""
        ...

    def forward(
        self, microbatch: int, layers: range, x_BTD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, D] behind `layers`, and a scalar: what these layers add to the loss.

        After the last layer that is the loss itself; before, balance losses of its routers.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the backward pass needs of a forward pass."""

    x_BTD: Tensor | None
    hidden_BTD: Tensor
    loss: Tensor


@dataclass(frozen=True, slots=True)
class Pipeline:
    """This rank's stage. Sends never wait and receives do, so every valid schedule goes through."""

    model: GPT
    mesh: Mesh

    @property
    def is_last(self) -> bool:
        """Whether this stage computes the loss."""
        return self.mesh.place.stage == self.mesh.layout.pp - 1

    def run(
        self,
        actions: Sequence[Action],
        passes: Passes,
        after_backward: Callable[[bool], None] = lambda last: None,
    ) -> None:
        """Do the actions in order. Collective over the stages; gradients are added to `.grad`.

        Without gradients (torch.no_grad) nothing is kept of forward passes. `after_backward(last)`
        is called behind each backward pass.
        """
        chunks = self.mesh.layout.layer_chunks(self.model.spec.num_layers)
        stage, stages = self.mesh.place.stage, self.mesh.layout.pp
        kept: dict[tuple[int, int], _Kept] = {}
        mail = _Mail(self.mesh)
        for action in actions:
            chunk = action.chunk * stages + stage
            before, behind = chunk > 0, chunk < len(chunks) - 1
            tag = action.microbatch * len(chunks) + chunk
            if action.is_forward:
                x_BTD = (
                    self._received(passes.shape(action.microbatch), mail, tag) if before else None
                )
                hidden_BTD, loss = passes.forward(action.microbatch, chunks[chunk], x_BTD)
                if behind:
                    mail.send(hidden_BTD.detach(), 1, tag + 1)
                if torch.is_grad_enabled():
                    kept[action.chunk, action.microbatch] = _Kept(x_BTD, hidden_BTD, loss)
            else:
                self._backward(kept.pop((action.chunk, action.microbatch)), behind, mail, tag)
                after_backward(action is actions[-1])
        mail.wait()

    def _received(self, shape: tuple[int, int], mail: "_Mail", tag: int) -> Tensor:
        length, layout = shape[1], self.mesh.layout
        if layout.tp > 1 and layout.sequence_parallel:
            length //= layout.tp
        like = next(self.model.parameters())
        x_BTD = torch.empty(
            shape[0],
            length,
            self.model.spec.d_model,
            dtype=self.model.compute_dtype,
            device=like.device,
        )
        mail.receive(x_BTD, -1, tag)
        return x_BTD.requires_grad_(torch.is_grad_enabled())

    def _backward(self, kept: _Kept, behind: bool, mail: "_Mail", tag: int) -> None:
        if behind:
            gradient_BTD = torch.empty_like(kept.hidden_BTD, memory_format=torch.contiguous_format)
            mail.receive(gradient_BTD, 1, -tag - 1)
            roots: list[Tensor] = [kept.hidden_BTD]
            gradients: list[Tensor | None] = [gradient_BTD]
            if kept.loss.requires_grad:
                roots.append(kept.loss)
                gradients.append(None)
            torch.autograd.backward(roots, gradients)
        else:
            torch.autograd.backward(kept.loss)
        if kept.x_BTD is not None:
            assert kept.x_BTD.grad is not None
            mail.send(kept.x_BTD.grad, -1, -tag)


class _Mail:
    """Tensors to and from neighbouring stages. Tags: forward above 0, backward below."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._sent: list[tuple[Any, Tensor]] = []

    def send(self, tensor: Tensor, stages: int, tag: int) -> None:
        """Start sending; the tensor is kept until it has left."""
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self._mesh.neighbour(stages), tag=_plain(tag))
        self._sent.append((work, tensor))

    def receive(self, tensor: Tensor, stages: int, tag: int) -> None:
        """Fill a tensor."""
        dist.recv(tensor, self._mesh.neighbour(stages), tag=_plain(tag))

    def wait(self) -> None:
        """Until all that was sent has left."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()


def _plain(tag: int) -> int:
    """Tags are not negative on the wire."""
    return 2 * tag if tag >= 0 else -2 * tag + 1
