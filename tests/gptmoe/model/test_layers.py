"""gptmoe.model.layers: causal attention, norms and linear layers in each precision.

Letters: B batch, T tokens, H heads, K head width.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptmoe.model.layers import SPAN, FeedForward, LayerNorm, attend_causally, linear, wide

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def naive_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
    score_BHTT = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK) / math.sqrt(q_BTHK.shape[-1])
    later_TT = torch.ones(score_BHTT.shape[-2:], dtype=torch.bool).triu(1)
    weight_BHTT = score_BHTT.masked_fill(later_TT, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshk->bthk", weight_BHTT, v_BTHK)


@each_dtype
@pytest.mark.parametrize("length", [1, 5, SPAN, 2 * SPAN + 3])
def test_causal_attention_and_its_gradients(dtype: torch.dtype, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    qkv = torch.randn(3, 2, length, 4, 16, generator=generator).to(dtype)
    narrow = list(qkv.requires_grad_().unbind(0))
    exact = [x.detach().double().requires_grad_() for x in narrow]
    probe_BTHK = torch.randn(2, length, 4, 16, generator=generator).to(dtype)

    found = attend_causally(0, *narrow)
    expected = naive_attention(*exact)
    assert found.dtype == dtype
    assert_near(found, expected, TOLERANCE[dtype])
    for one, other in zip(
        torch.autograd.grad(found, narrow, probe_BTHK),
        torch.autograd.grad(expected, exact, probe_BTHK.double()),
        strict=True,
    ):
        assert_near(one, other, TOLERANCE[dtype])


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Near on the whole: a single bfloat16 value may be off by its last bits."""
    error, size = (found - expected).detach().norm(), expected.detach().norm()
    assert float(error) <= tolerance * (1 + float(size))


@each_dtype
def test_layer_norm_computes_in_at_least_float32(dtype: torch.dtype) -> None:
    norm = LayerNorm(32).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    x = (100 + torch.randn(8, 32, generator=generator, dtype=torch.float64)).to(dtype)
    centred = x.double() - x.double().mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = scaled * norm.weight + norm.bias
    found = norm.to(wide(dtype))(x)
    assert found.dtype == dtype
    assert_near(found, expected, max(TOLERANCE[dtype], 1e-4 * (dtype != torch.float64)))


@each_dtype
def test_linear_casts_its_weights_to_the_rows(dtype: torch.dtype) -> None:
    layer = FeedForward(8, 16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    x = torch.randn(3, 8, generator=generator).to(dtype)
    up = F.linear(x.double(), layer.up.weight.double(), layer.up.bias.double())
    hidden = F.gelu(up, approximate="tanh")
    expected = F.linear(hidden, layer.down.weight.double(), layer.down.bias.double())
    found = layer(x)
    assert found.dtype == dtype
    assert_near(found, expected, TOLERANCE[dtype])
    without_bias = linear(x, layer.up.weight)
    assert_near(without_bias, up - layer.up.bias, TOLERANCE[dtype])


def test_wide_is_at_least_float32() -> None:
    assert [wide(dtype) for dtype in TOLERANCE] == [torch.float64, torch.float32, torch.float32]
    assert wide(torch.float16) == torch.float32
