"""Expert choice: experts choose tokens (Zhou et al. 2022, arXiv 2202.09368), causal at inference.

Letters: T tokens, D model width, E experts, G groups, N tokens of a group, R rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from .layers import linear
from .lsoftmax import annealed, margin_losses
from .routing import Groups, LinearRouter, Routing, Statistics
from .spec import RouterSpec
from .thresholds import averaged, passing
from .token_choice import z_loss


class ExpertChoiceRouter(LinearRouter):
    """In training each expert takes the k = n c / E tokens of a group that it scores highest.

    Scores are softmax(h W^T) over the experts; a token comes back as the sum of its experts'
    answers times their scores (eqs. 2 to 4). Who is chosen depends on later tokens, so each expert
    also learns a threshold, the moving average of the lowest score it took, by which it decides on
    a token alone (arXiv 2603.11535): always at evaluation and generation, where nothing is dropped,
    and in training after `threshold_warmup` optimizer steps. Training adds an L-Softmax loss on the
    preferences (see `_margin_loss`). Scores are float32 or wider.
    """

    threshold: Tensor
    """[E]; nothing before the first update."""
    updates: Tensor
    """Optimizer steps that the thresholds have seen."""

    def __init__(self, d_model: int, num_experts: int, spec: RouterSpec) -> None:
        super().__init__(d_model, num_experts, spec)
        self.register_buffer("threshold", torch.zeros(num_experts))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.acausal = False
        """Whether evaluation, too, chooses among all tokens of a group; see `acausal_routing`."""

    def route(self, h_TD: Tensor, groups: Groups) -> Routing:
        """Let experts take tokens; see Router.route."""
        seen_TD = self.seen(h_TD, groups)
        logits_TE = linear(seen_TD, self.weight)
        score_TE = logits_TE.softmax(-1)
        take_TE, cutoff_GE = self._take(score_TE.detach(), groups)
        token_R, expert_R = take_TE.nonzero(as_tuple=True)
        losses = {}
        if self.training:
            losses["margin_loss"] = self._margin_loss(logits_TE, score_TE, seen_TD, take_TE, groups)
            valid_T = groups.mask(h_TD)
            losses["z_loss"] = z_loss(logits_TE, valid_T, groups.tokens_per_group)
        return Routing(
            token_R=token_R,
            expert_R=expert_R,
            weight_R=score_TE[token_R, expert_R],
            num_experts=self.num_experts,
            losses=losses,
            count=partial(_count, score_TE.detach(), take_TE, cutoff_GE, groups),
            preference_T=score_TE.amax(-1) if self.spec.residual_layers else None,
        )

    @torch.no_grad()
    def update(self, statistics: Statistics) -> None:
        """Move the thresholds towards the mean cut-off of the step's groups."""
        self.updates += 1
        if groups := float(statistics.groups):
            mean_E = statistics.cutoff_E.to(self.threshold.device) / groups
            decay = self.spec.threshold_decay
            self.threshold.copy_(averaged(self.threshold, mean_E, int(self.updates), decay))

    def _take(self, score_TE: Tensor, groups: Groups) -> tuple[Tensor, Tensor | None]:
        """Which tokens each expert takes [T, E]; its cut-off in each group [G, E] if it compared.

        Once training routes by thresholds these still learn from the scores that it would have
        taken.
        """
        if not (self.training or self.acausal):
            return self._passing(score_TE, groups), None
        best_TE, cutoff_GE = choose(score_TE, groups, self.spec.capacity_factor)
        is_warm = self.training and int(self.updates) >= self.spec.threshold_warmup
        return self._passing(score_TE, groups) if is_warm else best_TE, cutoff_GE

    def _passing(self, score_TE: Tensor, groups: Groups) -> Tensor:
        # Before anything was learned an expert takes what it likes more than the mean.
        threshold_E = self.threshold.where(self.updates > 0, 1 / self.num_experts)
        return passing(score_TE, threshold_E, groups.valid_T)

    def _margin_loss(
        self, logits_TE: Tensor, score_TE: Tensor, seen_TD: Tensor, take_TE: Tensor, groups: Groups
    ) -> Tensor:
        """Sum over groups of the mean over taken tokens of the L-Softmax loss.

        A token's class is the expert that took it; of several the one that scores it highest.
        Tokens that nobody took do not count. Routing itself uses the plain logits.
        """
        spec = self.spec
        if not spec.margin_coef:
            return logits_TE.new_zeros(())
        mine_TE = torch.where(take_TE, score_TE.detach(), -1.0)
        loss_T = margin_losses(
            logits_TE, seen_TD, self.weight, mine_TE.argmax(-1), margin=spec.margin, ease=self._ease
        )
        taken_GN = take_TE.any(-1).view(-1, groups.tokens_per_group)
        loss_GN = torch.where(taken_GN, loss_T.view_as(taken_GN), 0.0)
        return (loss_GN.sum(1) / taken_GN.sum(1).clamp(min=1)).sum()

    @property
    def _ease(self) -> float:
        spec = self.spec
        return annealed(
            spec.margin_anneal_start,
            spec.margin_anneal_decay,
            spec.margin_anneal_floor,
            int(self.updates),
        )


def choose(score_TE: Tensor, groups: Groups, factor: float) -> tuple[Tensor, Tensor]:
    """Which tokens each expert takes [T, E], and the lowest score that it took [G, E].

    Of a group's n valid tokens an expert takes n * factor / E, rounded, at least 1 and at most n;
    of equal scores the earlier token. A group of padding alone has the cut-off infinity.
    """
    num_experts = score_TE.shape[1]
    score_GNE = score_TE.view(-1, groups.tokens_per_group, num_experts)
    if groups.valid_T is not None:
        score_GNE = score_GNE.masked_fill(~groups.valid_T.view(*score_GNE.shape[:2], 1), -torch.inf)
    tokens_G = (score_GNE[..., 0] >= 0).sum(1)
    share = min(factor / num_experts, 1.0)
    k_G = torch.floor(tokens_G.double() * share + 0.5).long()
    k_G = k_G.clamp(min=1).minimum(tokens_G)
    most = max(int(k_G.max()), 1)
    best_GKE = score_GNE.topk(most, dim=1).values
    cutoff_G1E = best_GKE.gather(
        1, (k_G - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, num_experts)
    )
    cutoff_G1E = cutoff_G1E.masked_fill((k_G == 0).view(-1, 1, 1), torch.inf)
    above_GNE, equal_GNE = score_GNE > cutoff_G1E, score_GNE == cutoff_G1E
    room_G1E = k_G.view(-1, 1, 1) - above_GNE.sum(1, keepdim=True)
    take_GNE = above_GNE | (equal_GNE & (equal_GNE.cumsum(1) <= room_G1E))
    return take_GNE.view_as(score_TE), cutoff_G1E.squeeze(1)


@contextmanager
def acausal_routing(model: nn.Module) -> Iterator[None]:
    """Within the block evaluation lets experts choose among the tokens of a whole batch.

    For comparison only: it sees later tokens, so its losses are better than the model can do.
    """
    routers = [module for module in model.modules() if isinstance(module, ExpertChoiceRouter)]
    for router in routers:
        router.acausal = True
    try:
        yield
    finally:
        for router in routers:
            router.acausal = False


def _count(
    score_TE: Tensor, take_TE: Tensor, cutoff_GE: Tensor | None, groups: Groups
) -> Statistics:
    valid_T = groups.mask(score_TE)
    entropy_T = -torch.special.xlogy(score_TE, score_TE).sum(-1)
    if cutoff_GE is None:
        cutoff_GE = score_TE.new_empty(0, score_TE.shape[1])
    seen_GE = cutoff_GE[cutoff_GE.isfinite().all(-1)]
    tokens = valid_T.sum()
    return Statistics(
        load_E=take_TE.sum(0),
        dropped=torch.zeros_like(tokens),
        tokens=tokens,
        entropy=(entropy_T * valid_T).sum(),
        unrouted=(valid_T & ~take_TE.any(-1)).sum(),
        cutoff_E=seen_GE.double().sum(0),
        groups=torch.full_like(tokens, len(seen_GE)),
    )
