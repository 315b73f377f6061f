"""Residual MoE: each token goes through a dense layer and experts (arXiv 2201.05596, section 4.1).

Letters: D model width.
"""

import torch
from torch import Tensor, nn

from .layers import linear, wide


class Mix(nn.Module):
    """out = MoE(x) c_0 + MLP(x) c_1 with c = softmax(W x + b), over the two of each token.

    The softmax is over the last dimension and computed in at least float32, as routers are.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, d_model))
        self.bias = nn.Parameter(torch.empty(2))

    def forward(self, x: Tensor, experts: Tensor, dense: Tensor) -> Tensor:
        """Mix the two answers to x, all of one shape [..., D]."""
        share = linear(x.to(wide(x.dtype)), self.weight, self.bias).softmax(-1)
        return (experts * share[..., :1] + dense * share[..., 1:]).to(experts.dtype)
