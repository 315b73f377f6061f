"""Experts with few rows each as one call of kernels: see fused.py.

Letters: R rows, E experts, D model width, F feed-forward width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels.library import Kernels, kernels
from .kernels.plain import LANES
from .kernels.program import Enters, Program
from .kernels.tasks import Gelu
from .packed_weight import entering


@dataclass(frozen=True, slots=True)
class EnteringExperts:
    """Experts whose products can be part of a program."""

    compiled: Kernels
    up: Sequence[Enters]
    down: Sequence[Enters]
    up_bias: Sequence[Tensor]
    """[F] of each expert."""
    down_bias: Sequence[Tensor]
    """[D] of each expert."""
    most_rows: int
    """Of an expert."""

    def are_few(self, spans: Sequence[tuple[int, int, int]]) -> bool:
        """Whether `run` takes so many rows; spans as of `expert_spans`."""
        return all(end - start <= self.most_rows for _, start, end in spans)

    def run(self, rows_RD: Tensor, spans: Sequence[tuple[int, int, int]]) -> Tensor:
        """The experts' answers to their rows, [R, D]."""
        out_RD = torch.empty_like(rows_RD)
        hidden_RF = rows_RD.new_empty(len(rows_RD), len(self.up_bias[0]))
        program = Program(self.compiled)
        for expert, start, end in spans:
            x, f, y = (rows[start:end] for rows in (rows_RD, hidden_RF, out_RD))
            program.add_product(self.up[expert], x, f, self.up_bias[expert])
            program.add("gelu", Gelu(x=f.data_ptr(), count=f.numel()))
            program.add_product(self.down[expert], f, y, self.down_bias[expert])
        program.run()
        return out_RD


def entering_experts(
    up: Sequence[object], down: Sequence[object], up_bias_EF: Tensor, down_bias_ED: Tensor
) -> EnteringExperts | None:
    """None where one of the weights cannot be part of a program, or rows fill no instruction."""
    compiled = kernels()
    weights = [weight for held in (*up, *down) if (weight := entering(held)) is not None]
    fits = up_bias_EF.shape[1] % LANES == 0 and down_bias_ED.shape[1] % LANES == 0
    if compiled is None or not fits or not weights or len(weights) < len(up) + len(down):
        return None
    return EnteringExperts(
        compiled=compiled,
        up=weights[: len(up)],
        down=weights[len(up) :],
        up_bias=up_bias_EF.detach().unbind(),
        down_bias=down_bias_ED.detach().unbind(),
        most_rows=min(weight.most_rows for weight in weights),
    )
