"""gptmoe.model.transformer: GPT-2's logits with our weights, logical names, causality, precision.

Letters: B sequences, T tokens, V vocabulary.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from gptmoe.model.counts import parameters
from gptmoe.model.initialize import initialize
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.model.transformer import GPT, Output

DENSE = ModelSpec(
    num_layers=3, d_model=32, num_heads=4, d_ff=128, vocab_size=101, max_seq_len=24, init_std=0.2
)
MIXTURE = ModelSpec(
    num_layers=4,
    d_model=32,
    num_heads=4,
    d_ff=64,
    vocab_size=101,
    max_seq_len=24,
    num_experts=(4, 6),
    router=RouterSpec(group_sequences=2),
    init_std=0.2,
)
TABLES = {"embed.tokens.weight": (101, 32), "embed.positions.weight": (24, 32)}
BLOCK = {
    "norm_attention.weight": (32,),
    "norm_attention.bias": (32,),
    "attention.qkv.weight": (96, 32),
    "attention.qkv.bias": (96,),
    "attention.out.weight": (32, 32),
    "attention.out.bias": (32,),
    "norm_ffn.weight": (32,),
    "norm_ffn.bias": (32,),
}


def make_model(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> GPT:
    model = GPT(spec, dtype).to(dtype)
    initialize(model, seed=0)
    return model


def make_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(101, (batch, length), generator=torch.Generator().manual_seed(0))


def logits_of(model: GPT, token_BT: Tensor) -> Tensor:
    with torch.no_grad():
        output: Output = model(token_BT)
        return model.logits(output.hidden_BTD)


def as_gpt2(model: GPT) -> Any:
    """transformers' GPT-2 with our weights: its linear layers are stored transposed."""
    spec = model.spec
    config = GPT2Config(
        vocab_size=spec.vocab_size,
        n_positions=spec.max_seq_len,
        n_embd=spec.d_model,
        n_layer=spec.num_layers,
        n_head=spec.num_heads,
        n_inner=spec.d_ff,
        bos_token_id=0,
        eos_token_id=0,
    )
    gpt2: Any = GPT2LMHeadModel(config).eval()  # type: ignore[no-untyped-call]
    names = {
        "embed.tokens": "wte",
        "embed.positions": "wpe",
        "layers.": "h.",
        "norm_attention": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "norm_ffn": "ln_2",
        "ffn.up": "mlp.c_fc",
        "ffn.down": "mlp.c_proj",
    }
    state = {}
    for name, tensor in model.state_dict().items():
        linear = ".attention." in name or ".ffn." in name
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        name = name.replace("norm.", "ln_f.")
        state[f"transformer.{name}"] = tensor.t() if linear else tensor
    state["lm_head.weight"] = state["transformer.wte.weight"]
    gpt2.load_state_dict(state)
    return gpt2


def randomize(model: GPT) -> GPT:
    """Values everywhere, so that no bias or norm hides by being 0 or 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def test_gpt2_with_our_weights_gives_our_logits() -> None:
    model = randomize(make_model(DENSE)).eval()
    token_BT = make_tokens(3, 24)
    with torch.no_grad():
        expected_BTV = as_gpt2(model)(token_BT).logits
    torch.testing.assert_close(logits_of(model, token_BT), expected_BTV, rtol=1e-5, atol=1e-5)


def test_gpt2_with_our_weights_chooses_our_greedy_tokens() -> None:
    model = randomize(make_model(DENSE)).eval()
    prompt_BT = make_tokens(1, 6)
    token_BT = prompt_BT
    for _ in range(18):
        next_B = logits_of(model, token_BT)[:, -1].argmax(-1)
        token_BT = torch.cat([token_BT, next_B.unsqueeze(1)], dim=1)
    expected_BT = as_gpt2(model).generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        min_new_tokens=18,
        max_new_tokens=18,
        do_sample=False,
        pad_token_id=0,
    )
    assert len(set(token_BT[0, 6:].tolist())) > 3
    assert token_BT.tolist() == expected_BT.tolist()


def test_dense_parameters_have_the_logical_names() -> None:
    ffn = {"up.weight": (128, 32), "up.bias": (128,), "down.weight": (32, 128), "down.bias": (32,)}
    block = BLOCK | {f"ffn.{name}": shape for name, shape in ffn.items()}
    expected = TABLES | {f"layers.{i}.{name}": block[name] for i in range(3) for name in block}
    expected |= {"norm.weight": (32,), "norm.bias": (32,)}
    model = GPT(DENSE)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(("layer", "experts"), [(1, 4), (3, 6)])
def test_moe_parameters_have_the_logical_names(layer: int, experts: int) -> None:
    prefix = f"layers.{layer}."
    found = {
        name.removeprefix(prefix): tuple(parameter.shape)
        for name, parameter in GPT(MIXTURE).named_parameters()
        if name.startswith(prefix)
    }
    assert found == BLOCK | {
        "ffn.router.weight": (experts, 32),
        "ffn.experts.up_weight": (experts, 64, 32),
        "ffn.experts.up_bias": (experts, 64),
        "ffn.experts.down_weight": (experts, 32, 64),
        "ffn.experts.down_bias": (experts, 32),
    }


@pytest.mark.parametrize("spec", [DENSE, MIXTURE])
def test_counted_parameters_are_allocated_ones(spec: ModelSpec) -> None:
    allocated = sum(parameter.numel() for parameter in GPT(spec).parameters())
    assert allocated == parameters(spec).total


@pytest.mark.parametrize("spec", [DENSE, MIXTURE])
@pytest.mark.parametrize("edited", [1, 7, 15])
def test_later_tokens_change_no_earlier_logit(spec: ModelSpec, edited: int) -> None:
    model = make_model(spec, torch.float64).eval()
    token_BT = make_tokens(3, 16)
    other_BT = token_BT.clone()
    other_BT[:, edited:] = (other_BT[:, edited:] + 1) % 101
    before, after = logits_of(model, token_BT), logits_of(model, other_BT)
    torch.testing.assert_close(before[:, :edited], after[:, :edited], rtol=1e-12, atol=1e-12)
    assert ((before - after)[:, edited].abs().amax(-1) > 1e-3).all()


def test_positions_are_an_argument() -> None:
    model = make_model(MIXTURE).eval()
    token_BT = make_tokens(2, 6)
    position_BT = torch.arange(6).expand(2, 6)
    with torch.no_grad():
        implied, given = model(token_BT), model(token_BT, position_BT)
        shifted = model(token_BT, position_BT + 1)
    assert torch.equal(implied.hidden_BTD, given.hidden_BTD)
    assert not torch.allclose(implied.hidden_BTD, shifted.hidden_BTD)


def test_padding_on_the_right_changes_nothing() -> None:
    model = make_model(MIXTURE, torch.float64)
    token_BT = make_tokens(2, 10)
    valid_BT = torch.ones(2, 10, dtype=torch.bool)
    padded_BT = torch.cat([token_BT, make_tokens(2, 4)], dim=1)
    padded_valid_BT = torch.cat([valid_BT, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    output, padded = model(token_BT), model(padded_BT, valid_BT=padded_valid_BT)
    torch.testing.assert_close(output.hidden_BTD, padded.hidden_BTD[:, :10], rtol=1e-12, atol=1e-12)
    for routing, other in zip(output.routings, padded.routings, strict=True):
        torch.testing.assert_close(routing.losses, other.losses)


def test_training_needs_whole_routing_groups() -> None:
    with pytest.raises(ValueError, match="3 sequences is not whole groups of 2"):
        make_model(MIXTURE)(make_tokens(3, 4))
    assert make_model(MIXTURE).eval()(make_tokens(3, 4)).hidden_BTD.shape == (3, 4, 32)
    assert make_model(DENSE)(make_tokens(3, 4)).hidden_BTD.shape == (3, 4, 32)


@pytest.mark.parametrize("spec", [DENSE, MIXTURE])
def test_bfloat16_products_stay_close(spec: ModelSpec) -> None:
    wide, narrow = make_model(spec).eval(), GPT(spec, torch.bfloat16).eval()
    narrow.load_state_dict(wide.state_dict())
    token_BT = make_tokens(2, 16)
    expected_BTV, found_BTV = logits_of(wide, token_BT), logits_of(narrow, token_BT)
    assert found_BTV.dtype == torch.bfloat16
    error_BT = (found_BTV.float() - expected_BTV).norm(dim=-1) / expected_BTV.norm(dim=-1)
    assert error_BT.median() < 0.02


def test_gradients_of_bfloat16_products_are_float32() -> None:
    model = GPT(MIXTURE, torch.bfloat16)
    initialize(model, seed=0)
    loss = model.logits(model(make_tokens(2, 8)).hidden_BTD).float().square().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@pytest.mark.parametrize("spec", [DENSE, MIXTURE])
def test_a_float64_model_computes_in_float64(spec: ModelSpec) -> None:
    """Slope by differences equals slope by gradients: one narrow step anywhere would leave 1e-1."""
    model = make_model(spec, torch.float64)
    token_BT, values = make_tokens(2, 5), list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values]

    def loss(step: float) -> Tensor:
        with torch.no_grad():
            for value, direction in zip(values, directions, strict=True):
                value.add_(direction, alpha=step)
        output: Output = model(token_BT)
        terms = [loss for routing in output.routings for loss in routing.losses.values()]
        return torch.stack([model.logits(output.hidden_BTD).square().mean(), *terms]).sum()

    gradients = torch.autograd.grad(loss(0.0), values)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    step = 1e-6
    ahead, behind = loss(step), loss(-2 * step)
    assert ahead.dtype == torch.float64
    assert (ahead - behind).item() / (2 * step) == pytest.approx(slope, rel=1e-6)
