"""The routers' state: buffers that no optimizer sees, stored in a checkpoint beside the weights.

They are whole on every rank that holds their layer, begin as zeros, and are kept in at least
float32.
"""

import torch
from torch import Tensor, nn

from gptmoe.checkpoint import Checkpoint
from gptmoe.errors import CheckpointError

from .layers import wide
from .transformer import GPT


def begin_state(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give the routers of a model on the meta device the state in which training begins."""
    for name, buffer in list(model.named_buffers()):
        _set(model, name, torch.zeros(buffer.shape, dtype=_kept(buffer, dtype), device=device))


def read_state(
    checkpoint: Checkpoint,
    model: GPT,
    device: torch.device,
    dtype: torch.dtype,
    *,
    learned: bool = True,
) -> None:
    """Fill the routers' state of a model, or of a stage of it, from a checkpoint of any layout.

    Raises CheckpointError for a state that is not there, or of another number of experts; and, as
    long as the state must be `learned`, for thresholds that no optimizer step has moved.
    """
    stored = set(checkpoint.names())
    for name, buffer in list(model.named_buffers()):
        if name not in stored:
            raise CheckpointError(_missing(checkpoint, name, model.spec.router.kind))
        found = checkpoint.shape(name)
        if tuple(found) != tuple(buffer.shape):
            raise CheckpointError(
                f"{checkpoint.path}: {name} has shape {list(found)}, the config wants "
                f"{list(buffer.shape)}; the folder mixes two models"
            )
        values = checkpoint.read(name).to(device=device, dtype=_kept(buffer, dtype), copy=True)
        if learned and name.endswith(".updates") and not values:
            raise CheckpointError(
                f"{checkpoint.path}: {name} is 0, no thresholds were learned; "
                f"{_calibrate(checkpoint)}"
            )
        _set(model, name, values)


def _calibrate(checkpoint: Checkpoint) -> str:
    return f"make them from data: gptmoe calibrate {checkpoint.path} --data FILE --output FOLDER"


def _missing(checkpoint: Checkpoint, name: str, kind: str) -> str:
    wanted = f"{checkpoint.path} has no {name}, without which a router of kind {kind} cannot choose"
    if kind == "expert_choice":
        return f"{wanted}; {_calibrate(checkpoint)}"
    return f"{wanted}; use a checkpoint that training with router.kind={kind} has written"


def _kept(buffer: Tensor, dtype: torch.dtype) -> torch.dtype:
    return wide(dtype) if buffer.is_floating_point() else buffer.dtype


def _set(model: nn.Module, name: str, values: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, values)
