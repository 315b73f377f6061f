"""Dropout whose masks belong to the samples, not to the ranks that compute them.

Letters: B sequences, T tokens, D model width.
"""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

EMBEDDINGS = -1
"""The layer number of the embeddings' dropout."""


class Drop(Protocol):
    """What is dropped of the output of a sub-layer on its way into the residual stream."""

    def __call__(self, x_BTD: Tensor, layer: int, part: str) -> Tensor:
        """Return x with some elements zeroed and the others scaled up."""
        ...


def keep_all(x_BTD: Tensor, layer: int, part: str) -> Tensor:
    """No dropout: evaluation's and generation's `Drop`."""
    return x_BTD


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleDropout:
    """Each mask is a function of (seed, step, layer, sample, position, channel).

    So every layout drops the same, a resumed run repeats it, and recompute needs no saved state.
    """

    probability: float
    seed: int
    step: int
    first_sample: int
    """Global index of the first of the consecutive samples in x."""
    length: int
    """Positions of a whole sequence."""
    first_position: int = 0
    """Where x begins in its sequences: above 0 on a slice of sequence parallelism."""

    def __call__(self, x_BTD: Tensor, layer: int, part: str) -> Tensor:
        """x / (1 - p) where the mask keeps it, else 0."""
        if not self.probability:
            return x_BTD
        keep = 1 - self.probability
        whole = (self.length, x_BTD.shape[-1])
        mine = slice(self.first_position, self.first_position + x_BTD.shape[1])
        mask_BTD = torch.stack(
            [
                torch.empty(whole, device=x_BTD.device, dtype=x_BTD.dtype).bernoulli_(
                    keep, generator=self._generator(x_BTD.device, layer, part, sample)
                )[mine]
                for sample in range(self.first_sample, self.first_sample + len(x_BTD))
            ]
        )
        return x_BTD * (mask_BTD / keep)

    def _generator(
        self, device: torch.device, layer: int, part: str, sample: int
    ) -> torch.Generator:
        return seeded(device, f"dropout/{self.seed}/{self.step}/{layer}/{part}/{sample}")


def seeded(device: torch.device, key: str) -> torch.Generator:
    """A generator that a name determines."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    return torch.Generator(device).manual_seed(number)
