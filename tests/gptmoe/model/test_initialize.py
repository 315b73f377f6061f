"""gptmoe.model.initialize: initial weights are a function of seed, name and expert."""

import math

import pytest
import torch
from torch import Tensor

from gptmoe.checkpoint.boxes import Box
from gptmoe.model.initialize import initial_values, initialize
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT

SPEC = ModelSpec(
    num_layers=4,
    d_model=64,
    num_heads=4,
    d_ff=256,
    vocab_size=500,
    max_seq_len=100,
    num_experts=(4, 8),
    init_std=0.02,
)

RESIDUAL = (".out.weight", ".down.weight", ".down_weight")
"""Matrices whose result is added to the residual stream: their scale depends on the depth."""


def weights(seed: int, spec: ModelSpec = SPEC) -> dict[str, Tensor]:
    model = GPT(spec)
    initialize(model, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_the_same_seed_gives_the_same_weights() -> None:
    assert_equal(weights(1), weights(1))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_every_matrix_of_every_seed_is_another() -> None:
    matrices = [w for seed in (1, 2) for w in weights(seed).values() if w.dim() > 1 and w.any()]
    firsts = {matrix.flatten()[0].item() for matrix in matrices}
    assert len(firsts) == len(matrices)


def test_every_expert_is_another() -> None:
    up_weight = weights(1)["layers.3.ffn.experts.up_weight"]
    assert len({expert[0, 0].item() for expert in up_weight}) == 8


@pytest.mark.parametrize(
    ("name", "start", "shape"),
    [
        ("layers.3.ffn.experts.up_weight", (4, 0, 0), (4, 256, 64)),
        ("layers.3.ffn.experts.up_weight", (3, 0, 16), (1, 256, 8)),
        ("layers.3.ffn.experts.down_bias", (2, 0), (3, 64)),
        ("layers.0.attention.out.weight", (0, 32), (64, 32)),
        ("embed.tokens.weight", (250, 0), (250, 64)),
        ("layers.1.norm_ffn.weight", (8,), (4,)),
    ],
)
def test_a_part_of_a_parameter_is_that_part_of_the_whole(
    name: str, start: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    whole, box = weights(1)[name], Box(start, shape)
    part = initial_values(name, tuple(whole.shape), SPEC, 1, box)
    assert torch.equal(part, whole[box.slices(Box.whole(whole.shape))])


def test_layers_before_others_do_not_move_them() -> None:
    shorter = ModelSpec(
        num_layers=2,
        d_model=64,
        num_heads=4,
        d_ff=256,
        vocab_size=500,
        max_seq_len=100,
        num_experts=(4,),
        init_std=0.02,
    )
    whole, part = weights(1), weights(1, shorter)
    same = [
        name for name in part if not name.endswith((".out.weight", "down.weight", "down_weight"))
    ]
    assert_equal({name: part[name] for name in same}, {name: whole[name] for name in same})


def test_the_generator_of_the_process_is_neither_read_nor_moved() -> None:
    torch.manual_seed(7)
    first = weights(1)
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), after)
    assert_equal(weights(1), first)


def test_float64_and_float32_start_from_the_same_values() -> None:
    model = GPT(SPEC, torch.float64).double()
    initialize(model, 1)
    expected = {name: weight.double() for name, weight in weights(1).items()}
    assert_equal({name: p.detach() for name, p in model.named_parameters()}, expected)


def test_standard_deviations() -> None:
    for name, weight in weights(1).items():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * SPEC.num_layers) if name.endswith(RESIDUAL) else 0.02
            slack = 5 / math.sqrt(2 * weight.numel())  # five standard errors
            assert float(weight.std()) == pytest.approx(std, rel=slack), name
            assert abs(float(weight.mean())) < 5 * std / math.sqrt(weight.numel()), name
