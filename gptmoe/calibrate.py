"""Thresholds for a checkpoint of experts that choose, from data alone.

calibrated = calibrate(open_checkpoint(folder), samples, output, groups=64)

Letters: E experts.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptmoe.checkpoint import Checkpoint, save, whole
from gptmoe.data import Samples
from gptmoe.errors import CheckpointError, ConfigError, DataError
from gptmoe.model.expert_choice import acausal_routing
from gptmoe.model.routing import Statistics
from gptmoe.model.transformer import GPT
from gptmoe.stored import read_network, spec_of
from gptmoe.tensors import TensorBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a checkpoint was given."""

    groups: int
    """Routing groups that were looked at."""
    thresholds: dict[int, Tensor]
    """[E] by MoE layer."""


def calibrate(
    checkpoint: Checkpoint,
    samples: Samples,
    output: Path,
    *,
    groups: int = 64,
    progress: Callable[[float], None] = lambda share: None,
) -> Calibration:
    """Write `checkpoint` anew to `output`, with the mean cut-offs of some groups as thresholds.

    The model sees the first `groups` routing groups of the samples as in evaluation, but experts
    choose as in training; each threshold is the mean of the lowest scores that its expert took.
    All else is copied, the optimizer's state too. `output` appears complete or not at all. Raises
    ConfigError for a model whose experts do not choose, CheckpointError if `output` exists,
    DataError if the samples fill no group.
    """
    spec = spec_of(checkpoint)
    if spec.router.kind != "expert_choice" or not spec.num_experts:
        kind = spec.router.kind if spec.num_experts else "none, it is dense"
        raise ConfigError(
            f"{checkpoint.path} has the router {kind}; only expert_choice has thresholds, "
            "use the checkpoint as it is"
        )
    if output.exists():
        raise CheckpointError(f"{output} exists already; name a new folder for the checkpoint")
    model = read_network(checkpoint, spec, torch.float32, torch.device("cpu"), calibrated=False)
    seen = cut_offs(model, samples, groups, progress)
    thresholds = {layer: (s.cutoff_E / s.groups).float() for layer, s in seen.items()}
    _write(checkpoint, output, thresholds)
    return Calibration(groups=int(next(iter(seen.values())).groups), thresholds=thresholds)


def cut_offs(
    model: GPT, samples: Samples, groups: int, progress: Callable[[float], None]
) -> dict[int, Statistics]:
    """The statistics of the first `groups` routing groups, by MoE layer, experts choosing."""
    size = model.spec.router.group_sequences
    count = min(groups, samples.num_samples // size)
    if count < 1:
        raise DataError(
            f"the data has {samples.num_samples} samples, a routing group has {size} "
            "(router.group_sequences); give more data"
        )
    seen = {
        layer: Statistics.zero(model.spec.experts_in_layer(layer))
        for layer in model.spec.moe_layers
    }
    with torch.inference_mode(), acausal_routing(model.eval()):
        for group in range(count):
            batch = TensorBatch.of(samples.batch(group * size, size), torch.device("cpu"))
            routings = model(batch.token_BT, valid_BT=batch.valid_BT).routings
            for layer, routing in zip(seen, routings, strict=True):
                seen[layer] += routing.statistics
            progress((group + 1) / count)
    return seen


def _write(checkpoint: Checkpoint, output: Path, thresholds: dict[int, Tensor]) -> None:
    """Weights and all else as they are, the routers' state new."""
    steps = max(1, int(checkpoint.progress.get("step", 1)))
    state = {f"layers.{layer}.ffn.router.threshold": t for layer, t in thresholds.items()}
    state |= {f"layers.{layer}.ffn.router.updates": torch.tensor(steps) for layer in thresholds}
    groups = {
        group: [
            whole(name, checkpoint.read(name, group=group))
            for name in checkpoint.names(group)
            if group != "weights" or name not in state
        ]
        for group in checkpoint.manifest.groups
    }
    groups["weights"] += [whole(name, values) for name, values in state.items()]
    tensors = [name for name in checkpoint.manifest.files if name.endswith(".safetensors")]

    def copy_others(folder: Path) -> None:
        for name in checkpoint.manifest.files:
            if name not in tensors and not (folder / name).exists():
                shutil.copyfile(checkpoint.path / name, folder / name)

    save(
        output,
        rank=0,
        world=1,
        barrier=lambda: None,
        groups=groups,
        config=checkpoint.config,
        progress=checkpoint.progress,
        copy_files=copy_others,
    )
