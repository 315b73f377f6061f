"""Top-1 Switch routing (Fedus et al. 2021, arXiv 2101.03961).

Letters: T tokens, E experts.
"""

from torch import Tensor

from .routing import Groups
from .token_choice import Choices, TokenChoiceRouter, balance_loss


class SwitchRouter(TokenChoiceRouter):
    """Each token goes to its likeliest expert and comes back times that probability (eq. 2)."""

    def choose(self, logits_TE: Tensor, groups: Groups) -> Choices:
        """The largest probability."""
        probability_TE = logits_TE.softmax(-1)
        weight_T, expert_T = probability_TE.max(-1)
        return Choices(expert_T.unsqueeze(0), weight_T.unsqueeze(0), probability_TE)

    def losses(
        self, logits_TE: Tensor, choices: Choices, groups: Groups, valid_T: Tensor
    ) -> dict[str, Tensor]:
        """The load-balancing loss (eq. 4) of first choices, and the z-loss."""
        aux = balance_loss(
            choices.probability_TE, choices.expert_KT[0], valid_T, groups.tokens_per_group
        )
        return {"aux_loss": aux, **super().losses(logits_TE, choices, groups, valid_T)}
