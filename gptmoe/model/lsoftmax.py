"""L-Softmax: a cross-entropy that wants a margin between the angles (arXiv 1612.02295).

Letters: T tokens, D model width, E classes (experts).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MARGINS = (1, 2, 3, 4)


def psi(cosine: Tensor, margin: int) -> Tensor:
    """psi(theta) = (-1)^k cos(m theta) - 2k for theta in [k pi / m, (k + 1) pi / m] (eq. 4).

    It falls from 1 to 1 - 2m as theta goes from 0 to pi; with m = 1 it is the cosine itself.
    """
    cosine = cosine.clamp(-1, 1)
    of_multiple = {
        1: lambda c: c,
        2: lambda c: 2 * c**2 - 1,
        3: lambda c: 4 * c**3 - 3 * c,
        4: lambda c: 8 * c**4 - 8 * c**2 + 1,
    }[margin](cosine)
    turns = torch.zeros_like(cosine, requires_grad=False)
    for step in range(1, margin):
        turns += cosine.detach() < math.cos(step * math.pi / margin)
    return (1 - 2 * (turns % 2)) * of_multiple - 2 * turns


def margin_losses(
    logits_TE: Tensor,
    h_TD: Tensor,
    weight_ED: Tensor,
    target_T: Tensor,
    *,
    margin: int,
    ease: float,
) -> Tensor:
    """-log softmax of the target's logit made harder by the margin, in nats, [T] (eqs. 5 to 7).

    `logits_TE` are h W^T without a bias. The target's becomes |w| |h| (ease cos + psi) / (1 + ease)
    (section 5.1: ease is lambda; a large one is the plain softmax). All in the type of the logits.
    """
    plain_T = logits_TE.gather(1, target_T.unsqueeze(1)).squeeze(1)
    length_T = weight_ED.to(logits_TE.dtype).norm(dim=1)[target_T]
    length_T = length_T * h_TD.to(logits_TE.dtype).norm(dim=1)
    tiny = torch.finfo(logits_TE.dtype).tiny
    cosine_T = plain_T / length_T.clamp(min=tiny)
    hard_T = (ease * plain_T + length_T * psi(cosine_T, margin)) / (1 + ease)
    hard_TE = logits_TE.scatter(1, target_T.unsqueeze(1), hard_T.unsqueeze(1))
    return F.cross_entropy(hard_TE, target_T, reduction="none")


def annealed(start: float, decay: float, floor: float, updates: int) -> float:
    """The ease after so many optimizer steps: max(floor, start * decay^updates)."""
    return max(floor, start * decay**updates)
