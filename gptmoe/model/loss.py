"""The language-model loss.  Letters: N tokens, D model width, V vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import wide


def token_losses(logits_NV: Tensor, label_N: Tensor) -> Tensor:
    """Negative log-likelihood of each label in nats, [N], computed in at least float32."""
    return F.cross_entropy(logits_NV.to(wide(logits_NV.dtype)), label_N, reduction="none")


def weighted_sum(losses_N: Tensor, weight_BT: Tensor) -> Tensor:
    """Sum of the losses of labels with weight True: a scalar, to be divided by the global count."""
    return torch.where(weight_BT.flatten(), losses_N, 0.0).sum()
