"""Top-2 routing (Lepikhin et al. 2020, arXiv 2006.16668, section 2.2 and algorithm 1).

Letters: T tokens, E experts, K = 2 choices.
"""

import torch
from torch import Tensor

from .routing import Groups
from .switch import SwitchRouter
from .token_choice import Choices


class Top2Router(SwitchRouter):
    """Each token goes to its two likeliest experts, weighed by their share of both probabilities.

    Second choices get what room the first ones leave, and the weights stay as they are when one is
    dropped. The load-balancing loss counts first choices. The paper also drops second choices at
    random by their weight; here all of them go.
    """

    def choose(self, logits_TE: Tensor, groups: Groups) -> Choices:
        """The two largest probabilities, made to add up to 1."""
        probability_TE = logits_TE.softmax(-1)
        first_T1 = probability_TE.detach().argmax(-1, keepdim=True)
        others_TE = probability_TE.detach().scatter(-1, first_T1, -1.0)
        expert_TK = torch.cat([first_T1, others_TE.argmax(-1, keepdim=True)], dim=-1)
        chosen_TK = probability_TE.gather(-1, expert_TK)
        weight_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True)
        return Choices(expert_TK.t(), weight_TK.t(), probability_TE)
