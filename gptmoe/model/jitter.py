"""Noise on what routers see in training; like dropout it belongs to the samples, not to the ranks.

Letters: T tokens of whole sequences, D model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .dropout import seeded


@dataclass(frozen=True, slots=True, kw_only=True)
class Jitter:
    """The noise is a function of (seed, step, layer, sample, position, channel).

    So microbatches, layouts and recompute see the same (input jitter: Fedus et al. 2021,
    arXiv 2101.03961, appendix C).
    """

    seed: int
    step: int
    first_sample: int
    """Global index of the first of the consecutive samples whose tokens are routed."""
    length: int
    """Positions of a whole sequence."""
    layer: int = 0

    def __call__(self, h_TD: Tensor, spread: float) -> Tensor:
        """h times noise that is uniform in [1 - spread, 1 + spread)."""
        samples = range(self.first_sample, self.first_sample + len(h_TD) // self.length)
        noise = [
            torch.empty(self.length, h_TD.shape[1], device=h_TD.device, dtype=h_TD.dtype).uniform_(
                1 - spread, 1 + spread, generator=self._generator(h_TD.device, sample)
            )
            for sample in samples
        ]
        return h_TD * torch.cat(noise)

    def _generator(self, device: torch.device, sample: int) -> torch.Generator:
        return seeded(device, f"jitter/{self.seed}/{self.step}/{self.layer}/{sample}")
