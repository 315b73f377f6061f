"""gptmoe.model.counts: parameters by arithmetic."""

import dataclasses

import pytest
import torch

from gptmoe.model.counts import Count, parameters
from gptmoe.model.presets import PRESETS, preset
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.model.transformer import GPT

TINY = ModelSpec(num_layers=2, d_model=4, num_heads=2, d_ff=8, vocab_size=10, max_seq_len=6)


def test_a_tiny_dense_model_counted_by_hand() -> None:
    embeddings = 10 * 4 + 6 * 4
    norms = 2 * (4 + 4)
    attention = (4 * 12 + 12) + (4 * 4 + 4)
    ffn = (4 * 8 + 8) + (8 * 4 + 4)
    count = embeddings + 2 * (norms + attention + ffn) + (4 + 4)
    assert parameters(TINY) == Count(total=count, active=count)


def test_experts_count_in_total_and_one_of_them_is_active() -> None:
    mixture = dataclasses.replace(TINY, num_experts=(3,))
    router, expert = 3 * 4, (4 * 8 + 8) + (8 * 4 + 4)
    dense = parameters(TINY).total
    assert parameters(mixture) == Count(dense + router + 2 * expert, dense + router)


def test_each_moe_layer_has_its_own_number_of_experts() -> None:
    pyramid = dataclasses.replace(TINY, num_layers=4, num_experts=(2, 5))
    flat = dataclasses.replace(TINY, num_layers=4, num_experts=(2, 2))
    router_row_and_expert = 4 + (4 * 8 + 8) + (8 * 4 + 4)
    more = parameters(pyramid).total - parameters(flat).total
    assert more == 3 * router_row_and_expert


@pytest.mark.parametrize("name", [*PRESETS, "0.125B+MoE-6"])
def test_arithmetic_equals_the_model(name: str) -> None:
    spec = preset(name).spec
    with torch.device("meta"):
        model = GPT(spec)
    shapes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert parameters(spec).total == sum(shapes.values())
    idle = sum(
        size * (spec.num_experts[0] - 1) // spec.num_experts[0]
        for name, size in shapes.items()
        if ".experts." in name
    )
    assert parameters(spec).active == sum(shapes.values()) - idle


CHOOSING = RouterSpec(kind="expert_choice", capacity_factor=2.0, residual_depth=3)
VARIANTS = {
    "expert choice": dataclasses.replace(TINY, num_experts=(3,), router=CHOOSING),
    "residual MoE": dataclasses.replace(TINY, num_experts=(3,), residual_moe=True),
    "both, a pyramid": dataclasses.replace(
        TINY, num_layers=4, num_experts=(3, 6), residual_moe=True, router=CHOOSING
    ),
    "dense": dataclasses.replace(TINY, residual_moe=True, router=CHOOSING),
}


@pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS)
def test_shared_layers_count_for_every_token(spec: ModelSpec) -> None:
    with torch.device("meta"):
        shapes = {name: p.numel() for name, p in GPT(spec).named_parameters()}
    expert = (4 * 8 + 8) + (8 * 4 + 4)
    assert parameters(spec).total == sum(shapes.values())
    others = sum(size for name, size in shapes.items() if ".experts." not in name)
    rows = spec.router.rows_per_token * len(spec.num_experts)
    assert parameters(spec).active == others + round(rows * expert)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("0.35B+MoE-64", 6.70),
        ("1.3B+MoE-32", 13.80),
        ("1.3B+MoE-64", 26.69),
        ("2.7B+MoE-64", 55.52),
        ("3.6B+MoE-64", 74.92),
    ],
)
def test_the_published_sizes(name: str, billions: float) -> None:
    assert parameters(preset(name).spec).total / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("name", ["0.125B", "0.35B", "1.3B", "2.7B", "6.7B", "13B", "30B", "175B"])
def test_dense_names_say_their_size(name: str) -> None:
    count = parameters(preset(name).spec)
    assert count.total / 1e9 == pytest.approx(float(name.removesuffix("B")), rel=0.02)
    assert count.active == count.total
