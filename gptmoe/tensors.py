"""A batch of samples as tensors.  Letters: B sequences, T tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptmoe.data import Batch


@dataclass(frozen=True, slots=True)
class TensorBatch:
    """One microbatch on a device; `valid_BT` is None where nothing is padding."""

    token_BT: Tensor
    label_BT: Tensor
    weight_BT: Tensor
    valid_BT: Tensor | None

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "TensorBatch":
        """Move a batch of arrays to `device`."""
        arrays = (batch.tokens_BT, batch.labels_BT, batch.weight_BT, batch.valid_BT)
        token, label, weight, valid = (torch.from_numpy(array).to(device) for array in arrays)
        return cls(token, label, weight, None if batch.valid_BT.all() else valid)
