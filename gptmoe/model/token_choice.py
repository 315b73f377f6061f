"""What routers share in which tokens choose: capacity, balance losses, statistics.

Letters: T tokens, D model width, E experts, G groups, K choices of each token, R rows.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .routing import Groups, LinearRouter, Routing, Statistics, rank_within
from .spec import RouterSpec


@dataclass(frozen=True, slots=True)
class Choices:
    """The experts that each token would go to, its first choice first."""

    expert_KT: Tensor
    weight_KT: Tensor
    probability_TE: Tensor
    """The softmax of the logits; of the balance loss and the entropy."""


class TokenChoiceRouter(LinearRouter):
    """Each token chooses its experts.

    In training an expert takes at most its capacity of each group: first choices before second
    ones, each in position order; what does not fit keeps only its residual path. At evaluation and
    generation nothing is dropped. All probabilities are float32 or wider.
    """

    def choose(self, logits_TE: Tensor, groups: Groups) -> Choices:
        """Each token's experts and their weights."""
        raise NotImplementedError

    def losses(
        self, logits_TE: Tensor, choices: Choices, groups: Groups, valid_T: Tensor
    ) -> dict[str, Tensor]:
        """What training adds to the loss, summed over the groups."""
        return {"z_loss": z_loss(logits_TE, valid_T, groups.tokens_per_group)}

    def route(self, h_TD: Tensor, groups: Groups) -> Routing:
        """Choose, and in training admit and weigh the balance; see Router.route."""
        logits_TE = self.logits(h_TD, groups)
        choices = self.choose(logits_TE, groups)
        losses: dict[str, Tensor] = {}
        keep_KT = None
        if self.training:
            valid_T = groups.mask(h_TD)
            keep_KT = admit(choices.expert_KT, valid_T, groups, self.num_experts, self.spec)
            losses = self.losses(logits_TE, choices, groups, valid_T)
        elif groups.valid_T is not None:
            keep_KT = groups.valid_T.expand(choices.expert_KT.shape)
        token_R, expert_R, weight_R = _rows(choices, keep_KT)
        return Routing(
            token_R=token_R,
            expert_R=expert_R,
            weight_R=weight_R,
            num_experts=self.num_experts,
            losses=losses,
            count=partial(
                _count, choices.expert_KT, choices.probability_TE.detach(), groups, token_R
            ),
        )


def admit(
    expert_KT: Tensor, valid_T: Tensor, groups: Groups, num_experts: int, spec: RouterSpec
) -> Tensor:
    """Which choices of which tokens find room, [K, T]."""
    choices, tokens = expert_KT.shape
    group_T = group_of(tokens, groups.tokens_per_group, expert_KT.device)
    num_groups = tokens // groups.tokens_per_group
    nowhere = num_groups * num_experts
    key_KT = torch.where(valid_T, group_T * num_experts + expert_KT, nowhere)
    rank_KT = rank_within(key_KT.flatten(), nowhere + 1)[0].view_as(expert_KT)
    tokens_G = valid_T.view(num_groups, -1).sum(-1)
    factor = min(spec.capacity_factor, num_experts)  # at E times the even share all fit
    capacity_G = torch.ceil(choices * tokens_G.double() * factor / num_experts).long()
    capacity_G = capacity_G.clamp(min=spec.min_capacity)
    return valid_T & (rank_KT < capacity_G[group_T])


def group_of(tokens: int, per_group: int, device: torch.device) -> Tensor:
    """The group of each token, [T]."""
    return torch.arange(tokens // per_group, device=device).repeat_interleave(per_group)


def balance_loss(
    probability_TE: Tensor, expert_T: Tensor, valid_T: Tensor, tokens_per_group: int
) -> Tensor:
    """Sum over groups of E * sum_e f_e P_e (Fedus et al. 2021, arXiv 2101.03961, eq. 4).

    f is the share of the tokens that chose e (`expert_T`, dropped or not), P the mean probability.
    """
    tokens, num_experts = probability_TE.shape
    num_groups = tokens // tokens_per_group
    nowhere = num_groups * num_experts
    group_T = group_of(tokens, tokens_per_group, expert_T.device)
    key_T = torch.where(valid_T, group_T * num_experts + expert_T, nowhere)
    chosen_GE = torch.bincount(key_T, minlength=nowhere + 1)[:-1].view(num_groups, num_experts)
    tokens_G = chosen_GE.sum(-1).clamp(min=1)
    mask_T1 = valid_T.to(probability_TE.dtype).unsqueeze(-1)
    mass_GE = (probability_TE * mask_T1).view(num_groups, -1, num_experts).sum(1)
    balance_G = num_experts * (chosen_GE * mass_GE).sum(-1) / tokens_G.to(mass_GE.dtype) ** 2
    return balance_G.sum()


def z_loss(logits_TE: Tensor, valid_T: Tensor, tokens_per_group: int) -> Tensor:
    """Sum over groups of the mean square of log sum exp (Zoph et al. 2022, arXiv 2202.08906,
    eq. 5)."""
    square_T = logits_TE.logsumexp(-1).square() * valid_T.to(logits_TE.dtype)
    tokens_G = valid_T.view(-1, tokens_per_group).sum(-1).clamp(min=1)
    return (square_T.view(-1, tokens_per_group).sum(-1) / tokens_G).sum()


def _rows(choices: Choices, keep_KT: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Token, expert and weight of each choice that is kept; None = all are."""
    expert_R, weight_R = choices.expert_KT.flatten(), choices.weight_KT.flatten()
    places, tokens = choices.expert_KT.shape
    if keep_KT is None:
        token_T = torch.arange(tokens, device=expert_R.device)
        return token_T if places == 1 else token_T.repeat(places), expert_R, weight_R
    kept_R = keep_KT.flatten().nonzero().squeeze(1)
    return kept_R % tokens, expert_R[kept_R], weight_R[kept_R]


def _count(
    expert_KT: Tensor, probability_TE: Tensor, groups: Groups, token_R: Tensor
) -> Statistics:
    choices, num_experts = len(expert_KT), probability_TE.shape[1]
    valid_T = groups.mask(probability_TE)
    tokens = valid_T.sum()
    entropy_T = -torch.special.xlogy(probability_TE, probability_TE).sum(-1)
    none = torch.zeros_like(tokens)
    return Statistics(
        load_E=torch.bincount(expert_KT[:, valid_T].flatten(), minlength=num_experts),
        dropped=choices * tokens - len(token_R),
        tokens=tokens,
        entropy=(entropy_T * valid_T).sum(),
        unrouted=tokens - torch.zeros_like(valid_T).index_fill(0, token_R, True).sum(),
        cutoff_E=torch.zeros(num_experts, dtype=torch.float64, device=tokens.device),
        groups=none,
    )
