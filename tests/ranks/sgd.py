"""A body for the pool: a few steps of plain SGD on a rank's slice of each batch, in float64.

Letters: B sequences, T tokens, E experts.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gptmoe.model.loss import weighted_loss
from gptmoe.model.moe import MoE
from gptmoe.model.spec import ModelSpec
from gptmoe.model.switch import SwitchRouter
from gptmoe.model.transformer import GPT, Block, Output
from gptmoe.parallel.apply import build
from gptmoe.parallel.layout import Layout
from gptmoe.parallel.mesh import Mesh, join
from gptmoe.parallel.optimizer import OptimizerSpec
from gptmoe.parallel.ownership import Owned, owned_parameters
from gptmoe.parallel.updater import PlainUpdater

NUM_SEQUENCES, LENGTH = 8, 7


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and how it is trained."""

    spec: ModelSpec
    padded_from: int = NUM_SEQUENCES
    """Sequences of the global batch from here on are padding."""
    crowded: bool = False
    """All tokens choose expert 0."""
    microbatch: int = 2
    """Sequences of one forward and backward pass."""
    steps: int = 6
    max_grad_norm: float = 0.25
    learning_rate: float = 0.3


@dataclass(slots=True)
class Trained:
    """What a rank saw: the global loss and norm of each step, and what it owns at the end."""

    losses: list[float]
    norms: list[float]
    owned: list[Owned]
    load_E: Tensor
    """Tokens of this rank that chose each expert of the first MoE layer, over all steps."""
    dropped: int


class Batch(NamedTuple):
    """A global batch."""

    token_BT: Tensor
    label_BT: Tensor
    weight_BT: Tensor
    valid_BT: Tensor


def train(rank: int, layout: Layout, case: Case) -> Trained:
    """Train on this rank's slice of each global batch. Collective unless the layout is one rank."""
    mesh = join(layout, rank)
    model = build(case.spec, mesh, torch.device("cpu"), torch.float64, seed=1)
    if case.crowded:
        crowd(model)
    optimizer = OptimizerSpec(kind="sgd", weight_decay=0.0, max_grad_norm=case.max_grad_norm)
    updater = PlainUpdater(model, mesh, optimizer)
    owned = owned_parameters(model, layout, rank)
    seen = Trained([], [], owned, torch.zeros(case.spec.num_experts[0], dtype=torch.long), 0)
    for step in range(case.steps):
        loss = torch.zeros((), dtype=torch.float64)
        batch = make_batch(step, case)
        for first in my_microbatches(mesh, case):
            loss += backward(model, batch, slice(first, first + case.microbatch), seen)
        if mesh.world_group is not None:
            dist.all_reduce(loss, group=mesh.world_group)
        seen.losses.append(loss.item())
        seen.norms.append(updater.step(case.learning_rate))
    return seen


def backward(model: GPT, batch: Batch, rows: slice, seen: Trained) -> Tensor:
    """Gradients of this microbatch's share of the global loss; returns that share."""
    token_BT, label_BT, weight_BT, valid_BT = (column[rows] for column in batch)
    output: Output = model(token_BT, valid_BT=valid_BT)
    loss = weighted_loss(model.logits(output.hidden_BTD), label_BT, weight_BT)
    loss = loss / batch.weight_BT.sum()
    router = model.spec.router
    num_groups = NUM_SEQUENCES // router.group_sequences
    for routing in output.routings:
        loss = loss + router.aux_loss_coef * routing.losses["aux_loss"] / num_groups
        loss = loss + router.z_loss_coef * routing.losses["z_loss"] / num_groups
        seen.dropped += int(routing.statistics.dropped)
    seen.load_E += output.routings[0].statistics.load_E
    torch.autograd.backward(loss)
    return loss.detach()


def my_microbatches(mesh: Mesh, case: Case) -> range:
    """First sequences of this rank's microbatches: dp ranks take consecutive equal slices."""
    share = NUM_SEQUENCES // mesh.layout.dp
    return range(mesh.rank * share, (mesh.rank + 1) * share, case.microbatch)


def make_batch(step: int, case: Case) -> Batch:
    """Sequences of different lengths, padded on the right; not every label counts."""
    generator = torch.Generator().manual_seed(step)
    shape = (NUM_SEQUENCES, LENGTH + 1)
    token_BS = torch.randint(case.spec.vocab_size, shape, generator=generator)
    length_B = torch.randint(LENGTH // 2, LENGTH + 1, (NUM_SEQUENCES, 1), generator=generator)
    length_B[case.padded_from :] = 0
    valid_BT = torch.arange(LENGTH) < length_B
    weight_BT = valid_BT & (torch.rand(valid_BT.shape, generator=generator) < 0.8)
    return Batch(token_BS[:, :-1], token_BS[:, 1:], weight_BT, valid_BT)


def crowd(model: GPT) -> None:
    """Give all tokens a feature that expert 0 likes and the others do not."""
    with torch.no_grad():
        for layer in model.spec.moe_layers:
            block = model.layers[layer]
            assert isinstance(block, Block)
            assert isinstance(block.ffn, MoE)
            assert isinstance(block.ffn.router, SwitchRouter)
            block.norm_ffn.bias[0] = 10.0
            block.ffn.router.weight[:, 0] = -0.5
            block.ffn.router.weight[0, 0] = 0.5
