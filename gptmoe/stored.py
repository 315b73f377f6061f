"""A model's spec and its network as a checkpoint has them."""

import math
from collections.abc import Sequence

import torch

from gptmoe import config as configs
from gptmoe.checkpoint import Checkpoint
from gptmoe.errors import CheckpointError, ConfigError
from gptmoe.model.spec import ModelSpec
from gptmoe.model.state import begin_state, read_state
from gptmoe.model.transformer import GPT

EXPERT_WEIGHTS = ("experts.up_weight", "experts.down_weight")
KEPT_WIDE = ("norm", "router", "ffn.mix")
"""Parts of parameter names that keep float32 in a narrower model: they compute in it."""


def spec_of(checkpoint: Checkpoint) -> ModelSpec:
    """The model's spec as stored in the checkpoint."""
    try:
        return configs.build(ModelSpec, checkpoint.config.get("model", {}), "model.")
    except ConfigError as error:
        raise CheckpointError(
            f"{checkpoint.path}: config.json describes no model of ours: {error}"
        ) from None


def read_network(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    *,
    as_stored: bool = False,
    calibrated: bool = True,
) -> GPT:
    """The whole model in this process, each weight read straight from the file.

    `as_stored` leaves weights in the type of the file, for somebody who rounds them himself. Unless
    it is `calibrated` the routers' state is not read but begins anew.
    """
    with torch.device("meta"):
        network = GPT(spec, compute_dtype=dtype)
    for name, parameter in list(network.named_parameters()):
        check_shape(checkpoint, name, parameter.shape)
        kept = checkpoint.dtype(name) if as_stored else kept_dtype(name, dtype)
        tensor = checkpoint.read(name).to(device=device, dtype=kept)
        owner, _, attribute = name.rpartition(".")
        setattr(
            network.get_submodule(owner), attribute, torch.nn.Parameter(tensor, requires_grad=False)
        )
    if calibrated:
        read_state(checkpoint, network, device, dtype)
    else:
        begin_state(network, device, dtype)
    return network.eval()


def mapped_expert_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of the experts' weights that a model of this type reads from the file where it lies."""
    names = [name for name in checkpoint.names() if name.endswith(EXPERT_WEIGHTS)]
    mapped = [name for name in names if checkpoint.maps(name) and checkpoint.dtype(name) == dtype]
    return sum(math.prod(checkpoint.shape(name)) * dtype.itemsize for name in mapped)


def may_copy(mapped_bytes: int, available: int | None) -> bool:
    """Whether mapped experts are copied into the kernels' layout: faster, but then they are there
    twice, in memory and in the page cache. They may if they take at most half of what is free."""
    return available is None or 2 * mapped_bytes <= available


def check_shape(checkpoint: Checkpoint, name: str, wanted: Sequence[int]) -> None:
    """Raise CheckpointError unless the stored parameter has the shape that the config wants."""
    found = checkpoint.shape(name)
    if tuple(found) != tuple(wanted):
        raise CheckpointError(
            f"{checkpoint.path}: {name} has shape {list(found)}, the config wants {list(wanted)}; "
            "the folder mixes two models"
        )


def kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of a parameter in a model of this type."""
    wide = any(part in name for part in KEPT_WIDE) and dtype == torch.bfloat16
    return torch.float32 if wide else dtype
