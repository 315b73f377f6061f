"""What a token costs, by hand; arms that cost the same; what cannot be made equal."""

import dataclasses
from pathlib import Path

import pytest

from gptmoe.config import load
from gptmoe.errors import ConfigError
from gptmoe.model.spec import ModelSpec, RouterSpec
from tests.train.study.conftest import ROOT, Configure
from train.study.config import StudyConfig
from train.study.flops import TOLERANCE, ffns_used, fit_d_ff, flops
from train.study.plan import sized

DENSE = ModelSpec(num_layers=2, d_model=8, num_heads=2, d_ff=32, vocab_size=100, max_seq_len=16)


def with_experts(**router: object) -> ModelSpec:
    kind = RouterSpec(**router)  # type: ignore[arg-type]
    return dataclasses.replace(DENSE, num_experts=(4,), router=kind)


def test_a_dense_model_by_hand() -> None:
    cost = flops(DENSE, seq_len=15)
    projections = 2 * (8 * 24 + 8 * 8)  # queries, keys, values; output
    scores = 2 * (8 * 8 + 8 * 8)  # 8 earlier tokens in the mean, each width times two products
    assert cost.attention == 2 * (projections + scores)
    assert cost.ffn == 2 * 2 * (8 * 32 + 32 * 8)
    assert cost.router == 0
    assert cost.head == 2 * 8 * 100
    assert cost.blocks == cost.attention + cost.ffn
    assert cost.total == cost.blocks + cost.head


def test_experts_that_a_token_uses() -> None:
    assert ffns_used(with_experts(kind="switch"), 4) == 1
    assert ffns_used(with_experts(kind="top2"), 4) == 2
    assert ffns_used(with_experts(kind="s_base"), 4) == 1
    choice = {"kind": "expert_choice", "capacity_factor": 1.5}
    assert ffns_used(with_experts(**choice, residual_depth=2), 4) == 3.5
    assert ffns_used(with_experts(**choice, residual_depth=0), 4) == 1.5
    assert ffns_used(with_experts(kind="expert_choice", capacity_factor=9.0), 4) == 4 + 1
    residual_moe = dataclasses.replace(with_experts(kind="switch"), residual_moe=True)
    assert ffns_used(residual_moe, 4) == 2
    assert ffns_used(residual_moe, 0) == 1


def test_a_mixture_costs_its_router_too() -> None:
    dense, mixture = flops(DENSE, 15), flops(with_experts(kind="switch"), 15)
    assert (mixture.ffn, mixture.attention) == (dense.ffn, dense.attention)
    assert mixture.router == 2 * 8 * 4
    mixed = dataclasses.replace(with_experts(kind="switch"), residual_moe=True)
    assert flops(mixed, 15).router == 2 * 8 * (4 + 2)


def test_the_width_at_which_residual_layers_are_paid_for() -> None:
    wide = dataclasses.replace(DENSE, d_ff=96)
    target = flops(wide, 15).blocks
    spec = dataclasses.replace(
        wide, num_experts=(4,), router=RouterSpec(kind="expert_choice", capacity_factor=1.0)
    )
    fitted = fit_d_ff(spec, 15, target, 2, "expert_choice-4")
    # one dense layer and a layer of two: 2 * 96 - 64 / 32 = 3 d_ff
    assert fitted.d_ff == 64
    assert flops(fitted, 15).blocks == pytest.approx(target, rel=TOLERANCE)


def test_what_cannot_be_equal_is_refused() -> None:
    target = flops(DENSE, 15).blocks
    spec = with_experts(kind="expert_choice", capacity_factor=4.0, residual_depth=4)
    with pytest.raises(
        ConfigError,
        match=r"arm expert_choice-4 with d_ff=16 costs \+.* against its reference, more than the "
        r"2% that count as equal; .*choose a larger model.d_ff, a smaller study.d_ff_multiple",
    ):
        fit_d_ff(spec, 15, target, 16, "expert_choice-4")


@pytest.mark.parametrize("name", ["tiny.toml", "small.toml", "headline.toml"])
def test_the_shipped_arms_cost_the_same(name: str) -> None:
    config = load(StudyConfig, ROOT / "configs" / "study" / name)
    models = {it.variant.name: it for it in sized(config, config.data.vocab_size)}
    dense = models["dense"].flops
    for variant, it in models.items():
        twice = 2 if variant == "dense_2x" else 1
        assert it.flops.blocks == pytest.approx(twice * dense.blocks, rel=0.02), variant
        assert it.flops.head == dense.head
    if "dense_2x" in models:
        assert models["dense_2x"].flops.attention == 2 * dense.attention
        assert models["dense_2x"].flops.ffn == 2 * dense.ffn
    choice = next(it for it in models.values() if it.variant.arm == "expert_choice")
    assert choice.spec.d_ff < 0.8 * models["dense"].spec.d_ff


def test_a_width_given_to_one_arm_must_fit(configure: Configure, tmp_path: Path) -> None:
    config = configure('overrides.switch=["model.d_ff=96"]')
    with pytest.raises(ConfigError, match=r"arm switch-4 with d_ff=96 costs -14\.\d% active"):
        sized(config, 3072)
    same = configure('overrides.switch=["model.d_ff=128"]')
    assert {it.spec.d_ff for it in sized(same, 3072) if it.variant.arm == "switch"} == {128}
