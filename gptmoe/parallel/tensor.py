"""Tensor and sequence parallelism: layers that hold a slice of their weights.

A column-sliced product computes a slice of its outputs, a row-sliced one a partial sum of them
(Shoeybi et al. 2019, arXiv 1909.08053, section 3). Between such pairs every rank of the tensor
group would do the same; with sequence parallelism each does its part of the sequence (Korthikanti
et al. 2022, arXiv 2205.05198, section 4.2): a gather before the pair, a reduce-scatter behind it,
instead of a sum.

Letters: B sequences, T tokens of a whole sequence, D model width, V vocabulary, R rows, N labels.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptmoe.model.experts import Experts, grouped_linear
from gptmoe.model.layers import Embedding, Linear, linear, wide
from gptmoe.model.moe import MoE
from gptmoe.model.routing import Groups, Routing
from gptmoe.model.transformer import GPT
from gptmoe.model.turns import Pausing

from .collectives import gather, reduce_scatter, sum_backward, sum_forward, take_slice


@dataclass(frozen=True, slots=True)
class Slices:
    """How hidden states enter and leave a pair of sliced products. Collective."""

    group: Any  # a ProcessGroup; None until the ranks have met
    index: int
    count: int
    sequence_parallel: bool

    def enter(self, x_BTD: Tensor) -> Tensor:
        """The whole sequence, for a column-sliced product."""
        if self.sequence_parallel:
            return gather(x_BTD, self.group, self.count)
        return sum_backward(x_BTD, self.group)

    def leave(self, partial_BTD: Tensor) -> Tensor:
        """The sum of the ranks' partial results: of this rank's part of the sequence, or all."""
        if self.sequence_parallel:
            return reduce_scatter(partial_BTD, self.group, self.count)
        return sum_forward(partial_BTD, self.group)

    def leave_own(self, own_BTD: Tensor) -> Tensor:
        """As `leave`, where a rank's results are zero outside its part of the sequence."""
        if self.sequence_parallel:
            return take_slice(own_BTD, self.index, self.count)
        return sum_forward(own_BTD, self.group)

    def own_tokens(self, x_BT: Tensor) -> Tensor:
        """Numbers of whole sequences' tokens, that every rank has, as hidden states are held.

        That is of this rank's part of the sequence; or of all of it, with gradients for that part
        only: the ranks' gradients add up.
        """
        first, stop = self.span(x_BT.shape[1])
        if self.sequence_parallel:
            return x_BT[:, first:stop]
        if not x_BT.requires_grad:
            return x_BT
        parts = [x_BT[:, :first].detach(), x_BT[:, first:stop], x_BT[:, stop:].detach()]
        return torch.cat(parts, 1)

    def span(self, length: int) -> tuple[int, int]:
        """First and last + 1 position of this rank's part of a sequence."""
        return length * self.index // self.count, length * (self.index + 1) // self.count


class ColumnLinear(Linear):
    """A slice of a linear layer's outputs, from the whole sequence."""

    slices: Slices

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        return super().forward(self.slices.enter(x), gelu=gelu)


class RowLinear(Linear):
    """A linear layer over slices of its inputs; the ranks' products add up."""

    slices: Slices

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        assert not gelu  # of a sum, not of its parts
        return self.slices.leave(linear(x, self.weight)) + self.bias.to(x.dtype)


class SlicedTokens(Embedding):
    """Rows of the token table from `first` on; other tokens are looked up by other ranks."""

    slices: Slices
    first: int

    def forward(self, index: Tensor) -> Tensor:
        local = index - self.first
        here = (local >= 0) & (local < len(self.weight))
        rows = super().forward(torch.where(here, local, 0)) * here.unsqueeze(-1)
        return self.slices.leave(rows)


class SlicedPositions(Embedding):
    """The position table, read for this rank's part of the sequence."""

    slices: Slices

    def forward(self, index: Tensor) -> Tensor:
        first, stop = self.slices.span(index.shape[1])
        return super().forward(index[:, first:stop])


class SpreadMoE(MoE):
    """Whole experts: each rank of the tensor group sends the tokens of its part of the sequence.

    The router sees whole groups of sequences on every rank, so that they drop the same tokens.
    """

    slices: Slices

    def ask(self, h_BTD: Tensor, groups: Groups) -> Pausing[tuple[Tensor, Routing]]:
        h_BTD = self.slices.enter(h_BTD)
        h_TD = h_BTD.flatten(0, -2)
        routing = self.router.route(h_TD, groups)
        mine = self._own_rows(routing, h_BTD.shape[1])
        own_TD = yield from self.answer(h_TD, mine)
        return self.slices.leave_own(own_TD.view_as(h_BTD)), routing

    def own(self, x_T: Tensor, h_BTD: Tensor) -> Tensor:
        return self.slices.own_tokens(x_T.view(len(h_BTD), -1))

    def _own_rows(self, routing: Routing, length: int) -> Routing:
        first, stop = self.slices.span(length)
        position_R = routing.token_R % length
        own = ((position_R >= first) & (position_R < stop)).nonzero().squeeze(1)
        return dataclasses.replace(
            routing,
            token_R=routing.token_R[own],
            expert_R=routing.expert_R[own],
            weight_R=routing.weight_R[own],
        )


class SlicedMoE(MoE):
    """Sliced experts: all ranks of the tensor group send all tokens, their answers add up."""

    slices: Slices

    def ask(self, h_BTD: Tensor, groups: Groups) -> Pausing[tuple[Tensor, Routing]]:
        partial_BTD, routing = yield from super().ask(self.slices.enter(h_BTD), groups)
        return self.slices.leave(partial_BTD), routing

    def own(self, x_T: Tensor, h_BTD: Tensor) -> Tensor:
        return self.slices.own_tokens(x_T.view(len(h_BTD), -1))


class SlicedExperts(Experts):
    """Column and row slices of each expert; the bias of the sum is added by slice 0 alone."""

    slices: Slices

    def forward(self, rows_RD: Tensor, rows_per_expert: list[int]) -> Tensor:
        hidden_RF = grouped_linear(rows_RD, self.up_weight, self.up_bias, rows_per_expert)
        hidden_RF = torch.nn.functional.gelu(hidden_RF, approximate="tanh")
        bias_ED = self.down_bias if self.slices.index == 0 else torch.zeros_like(self.down_bias)
        return grouped_linear(hidden_RF, self.down_weight, bias_ED, rows_per_expert)


class SlicedGPT(GPT):
    """A GPT whose head gives the scores of this rank's part of the vocabulary."""

    slices: Slices

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Scores over this rank's part of the vocabulary, for whole sequences."""
        return super().logits(self.slices.enter(hidden_BTD))

    def label_losses(self, hidden_BTD: Tensor, label_BT: Tensor) -> Tensor:
        """Negative log-likelihood of each label in nats, [B * T], on every rank."""
        tokens = self.embed.tokens
        assert isinstance(tokens, SlicedTokens)
        logits_NV = self.logits(hidden_BTD).flatten(0, 1)
        return sliced_token_losses(logits_NV, label_BT.flatten(), tokens.first, self.slices.group)


def sliced_token_losses(
    logits_NV: Tensor, label_N: Tensor, first: int, group: dist.ProcessGroup
) -> Tensor:
    """log sum exp - score of the label, over scores whose columns are spread over the group.

    This rank's columns begin at token `first`. Computed in at least float32; [N]. The maximum,
    which cancels, carries no gradient.
    """
    logits_NV = logits_NV.to(wide(logits_NV.dtype))
    highest_N = logits_NV.detach().amax(-1)
    dist.all_reduce(highest_N, op=dist.ReduceOp.MAX, group=group)
    shifted_NV = logits_NV - highest_N.unsqueeze(-1)
    local_N = label_N - first
    here_N = (local_N >= 0) & (local_N < logits_NV.shape[-1])
    own_N = shifted_NV.gather(-1, torch.where(here_N, local_N, 0).unsqueeze(-1)).squeeze(-1)
    parts_2N = torch.stack([shifted_NV.exp().sum(-1), own_N * here_N])
    sum_N, score_N = sum_forward(parts_2N, group)
    return sum_N.log() - score_N
