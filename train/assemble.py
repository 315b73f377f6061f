"""A rank's part of a run: model and updater with their state, samples, the numbers of a step."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from gptmoe import checkpoint
from gptmoe.checkpoint import Checkpoint
from gptmoe.data import Samples, Split, open_samples
from gptmoe.model.state import read_state
from gptmoe.model.transformer import GPT
from gptmoe.parallel.apply import build
from gptmoe.parallel.mesh import Mesh
from gptmoe.parallel.ownership import owned_parameters, state_pieces, weight_pieces
from gptmoe.parallel.updater import Updater

from .config import TrainConfig
from .loop import Trainer
from .passes import StepSettings
from .plan import RunPlan
from .saving import Saver

MakeUpdater = Callable[[GPT, Mesh, TrainConfig], Updater]


def build_or_load(
    plan: RunPlan, mesh: Mesh, device: torch.device, make_updater: MakeUpdater
) -> tuple[GPT, Updater]:
    """This rank's model and updater, with the state that they begin from."""
    start = plan.resume_from or plan.weights_from
    config = plan.config
    model = build(
        plan.spec,
        mesh,
        device,
        compute_dtype=getattr(torch, config.train.dtype),
        seed=None if start else config.run.seed,
        recompute_what=config.train.recompute,
        shards_on=torch.device("cpu") if config.parallel.offload else None,
    )
    # Whoever chose it has read all of it; each rank reads only its own part.
    stored = checkpoint.open_checkpoint(start, verify=False) if start else None
    if stored is not None:
        load_weights(model, stored, mesh)
    updater = make_updater(model, mesh, config)
    if stored is not None and plan.resume_from is not None and _has_stepped(stored):
        updater.load_state(lambda name, box: stored.read(name, box, "optimizer"))
    return model, updater


def _has_stepped(stored: Checkpoint) -> bool:
    """Whether its optimizer had taken a step: it has no state as long as all gradients overflow."""
    return stored.manifest.groups.get("optimizer") != {}


@torch.no_grad()
def load_weights(model: GPT, stored: Checkpoint, mesh: Mesh) -> None:
    """Fill this rank's parameters from a checkpoint of any layout."""
    for owned in owned_parameters(model, mesh.layout, mesh.rank):
        for box, part in owned.parts(owned.parameter):
            part.copy_(stored.read(owned.name, box))
    device = next(model.parameters()).device
    read_state(stored, model, device, torch.float32, learned=False)


def save(saver: Saver, trainer: Trainer, step: int) -> None:
    """Begin to write this rank's part of a checkpoint: all that `build_or_load` wants to go on."""
    mesh, model = trainer.pipeline.mesh, trainer.model
    owned = owned_parameters(model, mesh.layout, mesh.rank)
    weights = [*weight_pieces(owned), *state_pieces(model, mesh.layout, mesh.rank)]
    progress: dict[str, Any] = {"step": step, "samples": step * trainer.settings.batch_sequences}
    if trainer.scaler.state is not None:
        progress["loss_scale"] = asdict(trainer.scaler.state)
    saver.start(
        checkpoint.checkpoint_name(step),
        {"weights": weights, "optimizer": trainer.updater.state_pieces()},
        progress,
    )


def samples_of(plan: RunPlan, split: Split) -> Samples:
    config = plan.config
    return open_samples(plan.data_folder, split, config.data.seq_len, config.run.seed)


def step_settings(plan: RunPlan, mesh: Mesh) -> StepSettings:
    config = plan.config
    share = config.batch_sequences // mesh.layout.dp
    return StepSettings(
        seed=config.run.seed,
        seq_len=config.data.seq_len,
        batch_sequences=config.batch_sequences,
        microbatch_size=config.train.microbatch_size,
        first_sequence=mesh.place.data * share,
        num_sequences=share,
        schedule=config.schedule,
        pipeline=config.parallel.schedule,
        copies=config.train.copies,
    )
