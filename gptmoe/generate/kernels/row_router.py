"""Routers for inference that choose by a kernel: in a program, alone and in prompts the same bits.

Letters: T tokens, E experts, K choices of each token.
"""

import torch
from torch import Tensor, nn

from gptmoe.model.loss_free import LossFreeRouter
from gptmoe.model.routing import Groups
from gptmoe.model.s_base import SinkhornRouter
from gptmoe.model.switch import SwitchRouter
from gptmoe.model.token_choice import Choices, TokenChoiceRouter
from gptmoe.model.top2 import Top2Router

from .library import Kernels
from .router_weight import RouterWeight
from .tasks import Choose

KINDS = (SwitchRouter, Top2Router, SinkhornRouter, LossFreeRouter)
"""Outside training all of them choose the largest logits, loss-free ones by sigmoid and bias."""
ROWS_A_THREAD = 64
"""For fewer rows than these another thread is not worth waking."""


class RowRouter(TokenChoiceRouter):
    """One of these KINDS; its kernel takes each row by itself."""

    weight: RouterWeight
    compiled: Kernels

    def choose(self, logits_TE: Tensor, groups: Groups) -> Choices:
        """See TokenChoiceRouter.choose; not for training."""
        logits_TE, tokens = logits_TE.contiguous(), len(logits_TE)
        expert_KT = torch.empty(self.spec.choices, tokens, dtype=torch.long)
        weight_KT = torch.empty(self.spec.choices, tokens)
        task = self.task(logits_TE, expert_KT, weight_KT)
        self.compiled.run("choose", task, most_threads=1 + tokens // ROWS_A_THREAD)
        return Choices(expert_KT, weight_KT, logits_TE.softmax(-1))

    def task(self, logits_TE: Tensor, expert_KT: Tensor, weight_KT: Tensor) -> Choose:
        """What the kernel is told; it writes experts and weights."""
        bias = getattr(self, "bias", None)
        return Choose(
            logits=logits_TE.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            expert=expert_KT.data_ptr(),
            weight=weight_KT.data_ptr(),
            rows=len(logits_TE),
            experts=self.num_experts,
            choices=self.spec.choices,
        )


def use_row_routers(network: nn.Module, compiled: Kernels) -> None:
    """Have the routers of a network choose so, in place, where they can."""
    for module in network.modules():
        if type(module) in KINDS and isinstance(module.weight, RouterWeight):
            if isinstance(module, LossFreeRouter):
                module.bias = module.bias.float()
            module.__class__ = RowRouter
            assert isinstance(module, RowRouter)
            module.compiled = compiled
