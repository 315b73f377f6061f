"""Top-1 Switch routing (Fedus et al. 2021, arXiv 2101.03961).

Letters: T tokens, D model width, E experts, G groups.
"""

from functools import partial

import torch
from torch import Tensor, nn

from .layers import linear, wide
from .routing import Groups, Routing, Statistics, rank_within
from .spec import RouterSpec


class SwitchRouter(nn.Module):
    """Each token goes to its likeliest expert and comes back times that probability.

    In training an expert takes at most its capacity of each group, in position order; the other
    tokens keep only their residual path. At evaluation and generation nothing is dropped. Softmax
    is fp32 or wider.
    """

    def __init__(self, d_model: int, num_experts: int, spec: RouterSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))

    def route(self, h_TD: Tensor, groups: Groups) -> Routing:
        """Choose one expert a token; see Router.route."""
        dtype = wide(h_TD.dtype)
        logits_TE = linear(h_TD.to(dtype), self.weight)
        probability_TE = logits_TE.softmax(-1)
        weight_T, expert_T = probability_TE.max(-1)
        losses: dict[str, Tensor] = {}
        if self.training:
            valid_T = _mask(groups, expert_T)
            chosen_GE, keep_T = self._admit(expert_T, valid_T, groups.tokens_per_group)
            losses = _losses(logits_TE, probability_TE, chosen_GE, valid_T)
            token_R = keep_T.nonzero().squeeze(1)
        elif groups.valid_T is None:
            token_R = torch.arange(len(expert_T), device=expert_T.device)
        else:
            token_R = groups.valid_T.nonzero().squeeze(1)
        every = len(token_R) == len(expert_T)
        return Routing(
            token_R=token_R,
            expert_R=expert_T if every else expert_T[token_R],
            weight_R=weight_T if every else weight_T[token_R],
            num_experts=len(self.weight),
            losses=losses,
            count=partial(_count, probability_TE.detach(), expert_T, groups, len(token_R)),
        )

    def update(self, statistics: Statistics) -> None:
        """Switch keeps no state."""

    def _admit(
        self, expert_T: Tensor, valid_T: Tensor, tokens_per_group: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens that chose each expert in each group [G, E], and which of them it takes [T]."""
        num_experts = len(self.weight)
        num_groups = len(expert_T) // tokens_per_group
        group_T = torch.arange(num_groups, device=expert_T.device)
        group_T = group_T.repeat_interleave(tokens_per_group)
        nowhere = num_groups * num_experts
        key_T = torch.where(valid_T, group_T * num_experts + expert_T, nowhere)
        rank_T, count = rank_within(key_T, nowhere + 1)
        chosen_GE = count[:-1].view(num_groups, num_experts)
        tokens_G = chosen_GE.sum(-1)
        factor = min(self.spec.capacity_factor, num_experts)  # at E times the even share all fit
        capacity_G = torch.ceil(tokens_G.double() * factor / num_experts).long()
        capacity_G = capacity_G.clamp(min=self.spec.min_capacity)
        return chosen_GE, valid_T & (rank_T < capacity_G[group_T])


def _mask(groups: Groups, expert_T: Tensor) -> Tensor:
    """True on tokens that are no padding, [T]."""
    if groups.valid_T is not None:
        return groups.valid_T
    return torch.ones_like(expert_T, dtype=torch.bool)


def _losses(
    logits_TE: Tensor, probability_TE: Tensor, chosen_GE: Tensor, valid_T: Tensor
) -> dict[str, Tensor]:
    """Sums over groups of E * sum_e f_e P_e (2101.03961, eq. 4) and z-loss (2202.08906, eq. 5)."""
    num_groups, num_experts = chosen_GE.shape
    tokens_G = chosen_GE.sum(-1).clamp(min=1)
    mask_T1 = valid_T.to(probability_TE.dtype).unsqueeze(-1)
    mass_GE = (probability_TE * mask_T1).view(num_groups, -1, num_experts).sum(1)
    balance_G = num_experts * (chosen_GE * mass_GE).sum(-1) / tokens_G.to(mass_GE.dtype) ** 2
    square_T = logits_TE.logsumexp(-1).square() * mask_T1.squeeze(-1)
    z_G = square_T.view(num_groups, -1).sum(-1) / tokens_G
    return {"aux_loss": balance_G.sum(), "z_loss": z_G.sum()}


def _count(probability_TE: Tensor, expert_T: Tensor, groups: Groups, kept: int) -> Statistics:
    valid_T = _mask(groups, expert_T)
    tokens = valid_T.sum()
    entropy_T = -torch.special.xlogy(probability_TE, probability_TE).sum(-1)
    return Statistics(
        load_E=torch.bincount(expert_T[valid_T], minlength=probability_TE.shape[1]),
        dropped=tokens - kept,
        tokens=tokens,
        entropy=(entropy_T * valid_T).sum(),
    )
