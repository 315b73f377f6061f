"""gptmoe.model.residual and residual_moe: the shared layers of an MoE layer, in float64.

Letters: T tokens, D model width.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptmoe.model.initialize import initialize
from gptmoe.model.layers import FeedForward
from gptmoe.model.moe import MoE
from gptmoe.model.residual import ResidualLayer
from gptmoe.model.residual_moe import Mix
from gptmoe.model.routing import Groups
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.model.transformer import GPT, Block

D_MODEL, TOKENS = 6, 32


def make_moe(depth: int = 1, *, residual_moe: bool = False, kind: str = "expert_choice") -> MoE:
    router = RouterSpec(kind=kind, capacity_factor=1.0, residual_depth=depth)  # type: ignore[arg-type]
    spec = ModelSpec(
        num_layers=2,
        d_model=D_MODEL,
        num_heads=1,
        d_ff=8,
        vocab_size=11,
        max_seq_len=TOKENS,
        num_experts=(4,),
        residual_moe=residual_moe,
        init_std=0.5,
        router=router,
    )
    model = GPT(spec, torch.float64).double()
    initialize(model, seed=1)
    block = model.layers[1]
    assert isinstance(block, Block)
    assert isinstance(block.ffn, MoE)
    return block.ffn


def make_tokens() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(TOKENS, D_MODEL, generator=generator, dtype=torch.float64)


def randomize(moe: MoE) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(generator=generator)


def feed_forward(layer: FeedForward, x_D: Tensor) -> Tensor:
    hidden_F = F.gelu(layer.up.weight @ x_D + layer.up.bias, approximate="tanh")
    return layer.down.weight @ hidden_F + layer.down.bias


def residual_layer(layer: ResidualLayer, x_D: Tensor) -> Tensor:
    normed_D = (x_D - x_D.mean()) / (x_D.var(unbiased=False) + 1e-5).sqrt()
    return feed_forward(layer, normed_D * layer.norm.weight + layer.norm.bias)


@pytest.mark.parametrize("depth", [1, 3])
def test_at_initialisation_the_residual_is_the_identity(depth: int) -> None:
    moe, h_TD = make_moe(depth), make_tokens()
    assert moe.residual is not None
    with torch.no_grad():
        out_TD, _ = moe(h_TD, Groups(TOKENS))
        moe.residual = None
        without_TD, _ = moe(h_TD, Groups(TOKENS))
    assert torch.equal(out_TD, without_TD)


def test_only_the_last_linear_layers_begin_at_zero() -> None:
    moe = make_moe(2)
    assert moe.residual is not None
    for layer in moe.residual:
        assert isinstance(layer, ResidualLayer)
        assert not layer.down.weight.any()
        assert not layer.down.bias.any()
        assert float(layer.up.weight.detach().std()) > 0.1
        assert bool((layer.norm.weight == 1).all())


@pytest.mark.parametrize("depth", [1, 2])
def test_the_output_is_a_mix_of_the_stack_and_what_the_experts_said(depth: int) -> None:
    """a R(h) + (1 - a) h; where nobody took the token, a r(x)."""
    moe, h_TD = make_moe(depth), make_tokens()
    randomize(moe)
    stack = moe.residual
    assert stack is not None
    with torch.no_grad():
        out_TD, routing = moe(h_TD, Groups(TOKENS))
        moe.residual = None
        said_TD, _ = moe(h_TD, Groups(TOKENS))
        preference_T = (h_TD @ moe.router.weight.t()).softmax(-1).amax(-1)  # type: ignore[union-attr,operator]
        taken = set(routing.token_R.tolist())
        expected = []
        for token in range(TOKENS):
            a, h_D = preference_T[token], said_TD[token]
            start_D = h_D if token in taken else h_TD[token]
            stacked_D = start_D
            for layer in stack:
                assert isinstance(layer, ResidualLayer)
                stacked_D = stacked_D + residual_layer(layer, stacked_D)
            mixed_D = a * stacked_D + (1 - a) * h_D
            expected.append(mixed_D if token in taken else a * (stacked_D - start_D))
    assert 0 < len(taken) < TOKENS
    torch.testing.assert_close(out_TD, torch.stack(expected))


def test_depth_0_has_no_stack_and_no_preference() -> None:
    moe = make_moe(0)
    assert moe.residual is None
    assert moe(make_tokens(), Groups(TOKENS))[1].preference_T is None


def test_other_routers_have_no_stack() -> None:
    assert make_moe(3, kind="switch").residual is None


def test_gradients_reach_stack_experts_and_router_through_a() -> None:
    moe = make_moe(1)
    randomize(moe)
    out_TD, _ = moe(make_tokens(), Groups(TOKENS))
    out_TD.sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in moe.parameters())


def test_the_mix_is_a_softmax_over_the_two_of_each_token() -> None:
    mix = Mix(D_MODEL).double()
    with torch.no_grad():
        mix.weight.normal_(generator=torch.Generator().manual_seed(1))
        mix.bias.copy_(torch.tensor([0.5, -1.0]))
    x_TD = make_tokens()
    experts_TD, dense_TD = 2 * x_TD, x_TD - 1
    mix.requires_grad_(False)
    mixed_TD = mix(
        x_TD.view(2, -1, D_MODEL), experts_TD.view(2, -1, D_MODEL), dense_TD.view(2, -1, D_MODEL)
    )
    for x_D, experts_D, dense_D, mixed_D in zip(
        x_TD, experts_TD, dense_TD, mixed_TD.flatten(0, 1), strict=True
    ):
        first, second = (
            float((w_D @ x_D + b).exp()) for w_D, b in zip(mix.weight, mix.bias, strict=True)
        )
        expected_D = (experts_D * first + dense_D * second) / (first + second)
        torch.testing.assert_close(mixed_D.detach(), expected_D)


@pytest.mark.parametrize("kind", ["switch", "expert_choice"])
def test_a_residual_moe_mixes_experts_and_a_dense_layer(kind: str) -> None:
    moe, h_TD = make_moe(1, residual_moe=True, kind=kind), make_tokens()
    randomize(moe)
    mix, shared = moe.mix, moe.shared
    assert mix is not None
    assert shared is not None
    with torch.no_grad():
        out_TD, _ = moe(h_TD, Groups(TOKENS))
        moe.mix = None
        experts_TD, _ = moe(h_TD, Groups(TOKENS))
        dense_TD = torch.stack([feed_forward(shared, h_D) for h_D in h_TD])
        share_T2 = (h_TD @ mix.weight.t() + mix.bias).softmax(-1)
    expected_TD = experts_TD * share_T2[:, :1] + dense_TD * share_T2[:, 1:]
    torch.testing.assert_close(out_TD, expected_TD)
