"""s-BASE (Clark et al. 2022, arXiv 2202.01169): balanced assignment by Sinkhorn in training.

Letters: T tokens, E experts, G groups.
"""

from torch import Tensor

from .routing import Groups
from .sinkhorn import balanced_logits
from .token_choice import Choices, TokenChoiceRouter


class SinkhornRouter(TokenChoiceRouter):
    """In training the tokens of a group go where a balanced plan sends most of their mass; at
    evaluation each goes to its largest logit, whatever the others do.

    The weight is the softmax of the plain logits at that expert, so gradients know nothing of the
    plan, and there is no auxiliary loss. Rounding a plan to one expert a token leaves some
    imbalance: an expert still takes no more than its capacity.
    """

    def choose(self, logits_TE: Tensor, groups: Groups) -> Choices:
        """By the plan in training, by the logits else."""
        probability_TE = logits_TE.softmax(-1)
        expert_T1 = self._score(logits_TE.detach(), groups).argmax(-1, keepdim=True)
        weight_1T = probability_TE.gather(-1, expert_T1).t()
        return Choices(expert_T1.t(), weight_1T, probability_TE)

    def _score(self, logits_TE: Tensor, groups: Groups) -> Tensor:
        if not self.training:
            return logits_TE
        return balanced_logits(
            logits_TE.view(-1, groups.tokens_per_group, self.num_experts),
            groups.mask(logits_TE).view(-1, groups.tokens_per_group),
            self.spec.sinkhorn_iterations,
            self.spec.sinkhorn_tolerance,
        ).flatten(0, 1)
