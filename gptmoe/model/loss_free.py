"""Balance without a loss (Wang et al. 2024, arXiv 2408.15664): a bias on the choice alone.

Letters: T tokens, D model width, E experts.
"""

import torch
from torch import Tensor

from .routing import Groups, Statistics
from .spec import RouterSpec
from .token_choice import Choices, TokenChoiceRouter


class LossFreeRouter(TokenChoiceRouter):
    """Each token goes to the expert with the largest sigmoid(logit) + bias, and comes back times
    the sigmoid (section 3, eq. 3).

    After each optimizer step an expert with less than the mean load gains `bias_rate`, one with
    more loses as much (algorithm 1). At evaluation the bias stays as it is: what a token chooses
    depends on no other token. The paper drops nothing; that is capacity_factor = inf.
    """

    bias: Tensor

    def __init__(self, d_model: int, num_experts: int, spec: RouterSpec) -> None:
        super().__init__(d_model, num_experts, spec)
        self.register_buffer("bias", torch.zeros(num_experts))

    def choose(self, logits_TE: Tensor, groups: Groups) -> Choices:
        """The largest biased score; its weight is the plain one."""
        score_TE = logits_TE.sigmoid()
        expert_T1 = (score_TE.detach() + self.bias).argmax(-1, keepdim=True)
        weight_1T = score_TE.gather(-1, expert_T1).t()
        return Choices(expert_T1.t(), weight_1T, logits_TE.softmax(-1))

    @torch.no_grad()
    def update(self, statistics: Statistics) -> None:
        """Nudge the bias by the sign of the load's error."""
        load_E = statistics.load_E.to(self.bias.device).double()
        self.bias += self.spec.bias_rate * (load_E.mean() - load_E).sign()
