"""A body for the pool: a few steps of plain SGD on a rank's slice of each batch, in float64.

Letters: B sequences, T tokens, E experts.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gptmoe.model.dropout import SampleDropout
from gptmoe.model.moe import MoE
from gptmoe.model.routing import Statistics
from gptmoe.model.spec import ModelSpec
from gptmoe.model.switch import SwitchRouter
from gptmoe.model.transformer import GPT, Block
from gptmoe.parallel.apply import build
from gptmoe.parallel.layout import Layout
from gptmoe.parallel.mesh import Mesh, join
from gptmoe.parallel.optimizer import OptimizerSpec
from gptmoe.parallel.ownership import Owned, owned_parameters
from gptmoe.parallel.pipeline import Pipeline
from gptmoe.parallel.recompute import Recompute
from gptmoe.parallel.schedules import Kind, schedule
from gptmoe.parallel.updater import PlainUpdater
from gptmoe.tensors import TensorBatch
from train.passes import StepSettings, TrainingPasses
from train.report import reduce
from train.schedule import ScheduleSpec

NUM_SEQUENCES, LENGTH = 8, 8


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
    schedule: Kind = "1f1b"
    recompute: Recompute = "none"
    copies: int = 1
    """Parts of a microbatch that take turns."""


@dataclass(slots=True)
class Trained:
    """What a rank saw: the global loss and norm of each step, and what it owns at the end."""

    losses: list[float]
    norms: list[float]
    owned: list[Owned]
    load_E: Tensor
    """Tokens of this rank that chose each expert of the first MoE layer, over all steps; zeros
    where another stage holds it."""
    dropped: int
    """Rows of all ranks."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """What this rank's routers have learned at the end."""


class Batch(NamedTuple):
    """A global batch."""

    token_BT: Tensor
    label_BT: Tensor
    weight_BT: Tensor
    valid_BT: Tensor


def train(rank: int, layout: Layout, case: Case) -> Trained:
    """Train on this rank's slice of each global batch. Collective unless the layout is one rank."""
    mesh = join(layout, rank)
    model = build(
        case.spec, mesh, torch.device("cpu"), torch.float64, seed=1, recompute_what=case.recompute
    )
    if case.crowded:
        crowd(model)
    optimizer = OptimizerSpec(kind="sgd", weight_decay=0.0, max_grad_norm=case.max_grad_norm)
    updater = PlainUpdater(model, mesh, optimizer)
    owned = owned_parameters(model, layout, rank)
    seen = Trained(
        [], [], owned, torch.zeros(max((0, *case.spec.num_experts[:1])), dtype=torch.long), 0
    )
    pipeline = Pipeline(model, mesh)
    for step in range(case.steps):
        passes = make_passes(pipeline, case, step)
        count = len(passes.microbatches)
        actions = schedule(case.schedule, layout.pp, mesh.place.stage, count, layout.chunks)
        pipeline.run(actions, passes)
        lm_sum, *balance = mesh.sum(passes.totals.losses).tolist()
        seen.losses.append(lm_sum / float(passes.label_count) + sum(balance))
        seen.norms.append(updater.step(case.learning_rate))
        seen.dropped += int(mesh.sum(dropped(passes.totals.statistics)))
        teach_routers(model, mesh, passes.totals.statistics)
        first = passes.totals.statistics.get(1)
        if first is not None:
            seen.load_E += first.load_E
    seen.state = dict(model.named_buffers())
    return seen


def teach_routers(model: GPT, mesh: Mesh, mine: dict[int, Statistics]) -> None:
    """What a training step does with the statistics of its routers. Collective."""
    for layer in model.spec.moe_layers:
        none = Statistics.zero(model.spec.experts_in_layer(layer))
        total = reduce(mine.get(layer, none), mesh.sum)
        if layer in mine:
            block = model.layers[layer]
            assert isinstance(block, Block)
            assert isinstance(block.ffn, MoE)
            block.ffn.router.update(total)


def make_passes(pipeline: Pipeline, case: Case, step: int) -> TrainingPasses:
    """This rank's microbatches of a step: dp ranks take consecutive equal slices."""
    mesh, batch = pipeline.mesh, make_batch(step, case)
    share = NUM_SEQUENCES // mesh.layout.dp
    begin = mesh.place.data * share
    starts = range(begin, begin + share, case.microbatch)
    on_slice = mesh.layout.tp > 1 and mesh.layout.sequence_parallel
    return TrainingPasses(
        pipeline.model,
        StepSettings(
            seed=0,
            seq_len=LENGTH,
            batch_sequences=NUM_SEQUENCES,
            microbatch_size=case.microbatch,
            first_sequence=begin,
            num_sequences=share,
            schedule=ScheduleSpec(),
            copies=case.copies,
        ),
        mesh.layout,
        [
            TensorBatch(*(column[first : first + case.microbatch] for column in batch))
            for first in starts
        ],
        batch.weight_BT.sum().double(),
        SampleDropout(
            probability=case.spec.dropout,
            seed=0,
            step=step,
            first_sample=begin,
            length=LENGTH,
            first_position=mesh.place.slice * LENGTH // mesh.layout.tp if on_slice else 0,
        ),
    )


def dropped(statistics: dict[int, Statistics]) -> Tensor:
    """Tokens of this rank's layers and samples that found their expert full."""
    return torch.stack(
        [torch.zeros((), dtype=torch.long), *(s.dropped for s in statistics.values())]
    ).sum()


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
            if not isinstance(block, Block):  # on another stage
                continue
            assert isinstance(block.ffn, MoE)
            assert isinstance(block.ffn.router, SwitchRouter)
            block.norm_ffn.bias[0] = 10.0
            block.ffn.router.weight[:, 0] = -0.5
            block.ffn.router.weight[0, 0] = 0.5
