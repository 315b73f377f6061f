"""The plain layers of the decoder. Weights may be wider than the products: layers cast at use.

Letters: B batch, T tokens, D model width, F feed-forward width, H heads, K head width.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPAN = 128
"""Queries that meet the keys in one product where no fused kernel is used."""


class Attend(Protocol):
    """How queries meet keys: within the batch (training) or through a cache (generation)."""

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        """Return the attended values [B, T, H, K]."""
        ...


def wide(dtype: torch.dtype) -> torch.dtype:
    """What norms, routers and losses compute in: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


class ServedWeight(nn.Parameter):
    """A weight in another form than [out, in], for inference: it computes its own products."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b in the type of x; x has any leading dimensions."""
        raise NotImplementedError

    def activated(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """GELU (tanh form) of the product."""
        return F.gelu(self.product(x, bias), approximate="tanh")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x W^T + b in the type of x, W [out, in]; `gelu` applies GELU (tanh form, as in GPT-2)."""
    if isinstance(weight, ServedWeight):
        return weight.activated(x, bias) if gelu else weight.product(x, bias)
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return F.gelu(y, approximate="tanh") if gelu else y


class Linear(nn.Module):
    """y = x W^T + b with W [out, in]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        return linear(x, self.weight, self.bias, gelu=gelu)


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension, computed in at least float32."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.bias = nn.Parameter(torch.empty(d_model))

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(x.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if not weight.requires_grad and x.device.type == "cpu":
            # This kernel widens narrow rows itself, three times faster; its gradients are narrow.
            return torch.layer_norm(x, weight.shape, weight, bias, 1e-5)
        return F.layer_norm(x.to(dtype), weight.shape, weight, bias, eps=1e-5).to(x.dtype)


class Embedding(nn.Module):
    """Rows of a table [count, D]; the token table is also the output head."""

    def __init__(self, count: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, d_model))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


class FeedForward(nn.Module):
    """Two linear layers around GELU (tanh form, as in GPT-2)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = Linear(d_model, d_ff)
        self.down = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x, gelu=True))


class Attention(nn.Module):
    """Multi-head self-attention; what the queries may see is decided by the `attend` argument."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(d_model, 3 * d_model)
        self.out = Linear(d_model, d_model)

    def forward(self, x_BTD: Tensor, layer: int, attend: Attend) -> Tensor:
        qkv = self.qkv(x_BTD)
        q_BTHK, k_BTHK, v_BTHK = qkv.view(*qkv.shape[:2], 3, self.num_heads, -1).unbind(2)
        return self.out(attend(layer, q_BTHK, k_BTHK, v_BTHK).flatten(2))


def attend_causally(layer: int, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
    """Each position sees itself and the ones before it in its own sequence: training's `Attend`."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return _causal_products(q, k, v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _causal_products(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    """A span of queries at a time: with its backward half the time of torch's kernel for CPUs."""
    q_BHTK = q_BHTK * q_BHTK.shape[-1] ** -0.5
    later = torch.full((SPAN, SPAN), -torch.inf, dtype=q_BHTK.dtype).triu(1)
    answers = []
    for start in range(0, q_BHTK.shape[2], SPAN):
        stop = min(start + SPAN, q_BHTK.shape[2])
        score = q_BHTK[:, :, start:stop] @ k_BHTK[:, :, :stop].transpose(-1, -2)
        score[..., start:] += later[: stop - start, : stop - start]
        answers.append(score.softmax(-1) @ v_BHTK[:, :, :stop])
    return torch.cat(answers, 2)
