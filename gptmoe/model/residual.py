"""The Expert Residual: feed-forward layers behind the experts, shared by all tokens of a layer.

X_out = a R(h) + (1 - a) h = h + a r(h), where h is the weighted sum of the experts' answers, a the
token's largest preference and R(h) = h + r(h) a stack of pre-norm residual layers. This is the
sublayer of BASE (Lewis et al. 2021, arXiv 2103.16716, section 3.1) moved behind the combination.
The last linear layers begin at zero, weights and biases: then X_out = h exactly.

Letters: B sequences, T tokens, D model width.
"""

import torch
from torch import Tensor, nn

from .layers import FeedForward, LayerNorm


class ResidualLayer(FeedForward):
    """ffn(norm(x)): what one layer of the stack adds."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__(d_model, d_ff)
        self.norm = LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class ExpertResidual(nn.ModuleList):
    """The stack R of `depth` layers; 0 = none."""

    def __init__(self, depth: int, d_model: int, d_ff: int) -> None:
        super().__init__(ResidualLayer(d_model, d_ff) for _ in range(depth))

    def forward(
        self, x_BTD: Tensor, out_BTD: Tensor, preference_BT: Tensor, taken_BT: Tensor
    ) -> Tensor:
        """h + a r(h), h = `out_BTD` being the experts' answers to `x_BTD`.

        A token that no expert took (`taken_BT` False) has h = 0 and goes through the stack itself:
        its output is a r(x), so that the stack is the shared feed-forward layer of such tokens.
        """
        start_BTD = torch.where(taken_BT.unsqueeze(-1), out_BTD, x_BTD)
        added_BTD = torch.zeros_like(start_BTD)
        for layer in self:
            added_BTD = added_BTD + layer(start_BTD + added_BTD)
        weighted_BTD = added_BTD * preference_BT.unsqueeze(-1)  # in the precision of the weights
        return out_BTD + weighted_BTD.to(out_BTD.dtype)
