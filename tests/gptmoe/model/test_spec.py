"""gptmoe.model.spec: what a model is, and every sentence about what it cannot be."""

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest

from gptmoe.config import build, to_dict
from gptmoe.errors import ConfigError
from gptmoe.model.spec import ModelSpec, RouterSpec, expand_experts

VALID: Mapping[str, Any] = {"num_layers": 6, "d_model": 12, "num_heads": 3, "d_ff": 48}


def test_experts_sit_on_every_second_layer() -> None:
    spec = ModelSpec(**VALID, num_experts=(4, 8, 16))
    assert spec.moe_layers == (1, 3, 5)
    assert [spec.experts_in_layer(layer) for layer in range(6)] == [0, 4, 0, 8, 0, 16]
    assert spec.head_dim == 4


@pytest.mark.parametrize(
    ("interval", "layers"), [(1, (0, 1, 2, 3, 4, 5)), (3, (2, 5)), (4, (3,)), (6, (5,))]
)
def test_other_intervals(interval: int, layers: tuple[int, ...]) -> None:
    experts = expand_experts(2, 6, interval)
    spec = ModelSpec(**VALID, num_experts=experts, expert_interval=interval)
    assert spec.moe_layers == layers


def test_a_dense_model_has_no_moe_layers() -> None:
    spec = ModelSpec(**VALID)
    assert spec.moe_layers == ()
    assert [spec.experts_in_layer(layer) for layer in range(6)] == [0] * 6


@pytest.mark.parametrize(
    ("num_experts", "expected"), [(0, ()), (8, (8, 8, 8)), ((4, 8, 2), (4, 8, 2)), ((), ())]
)
def test_expand_experts(num_experts: int | tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert expand_experts(num_experts, num_layers=6, interval=2) == expected


def test_the_defaults_are_the_described_systems() -> None:
    spec, router = ModelSpec(**VALID), RouterSpec()
    assert (spec.vocab_size, spec.max_seq_len, spec.expert_interval) == (51_200, 2048, 2)
    assert (router.kind, router.aux_loss_coef, router.group_sequences) == ("switch", 0.01, 8)


def test_plain_data_and_back() -> None:
    spec = ModelSpec(**VALID, num_experts=(4, 4, 4), router=RouterSpec(capacity_factor=2.0))
    assert build(ModelSpec, to_dict(spec)) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "model.num_layers=0 must be at least 1"),
        ({"d_model": 0}, "model.d_model=0 must be at least 1"),
        ({"num_heads": -1}, "model.num_heads=-1 must be at least 1"),
        ({"d_ff": 0}, "model.d_ff=0 must be at least 1"),
        ({"vocab_size": 0}, "model.vocab_size=0 must be at least 1"),
        ({"max_seq_len": 0}, "model.max_seq_len=0 must be at least 1"),
        ({"expert_interval": 0}, "model.expert_interval=0 must be at least 1"),
        ({"init_std": -0.1}, "model.init_std=-0.1 must be at least 0"),
        ({"init_std": math.nan}, "model.init_std=nan must be at least 0"),
        ({"dropout": 1.0}, "model.dropout=1.0 must be at least 0 and below 1"),
        ({"dropout": math.nan}, "model.dropout=nan must be at least 0 and below 1"),
        (
            {"num_heads": 5},
            "model.num_heads=5 must divide model.d_model=12; use one of 1, 2, 3, 4, 6, 12",
        ),
        (
            {"num_experts": (4, 4)},
            "model.num_experts has 2 numbers, but 6 layers with model.expert_interval=2 have "
            "3 MoE layers; give one number for all or 3",
        ),
        ({"num_experts": (4, 0, 4)}, "model.num_experts=0 must be at least 1"),
        (
            {"num_experts": (4, 1, 4), "router": RouterSpec(kind="top2")},
            "router.kind=top2 sends a token to 2 experts, but a layer has model.num_experts=1; "
            "give more, or use router.kind=switch",
        ),
    ],
)
def test_a_model_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        ModelSpec(**{**VALID, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capacity_factor": 0.0}, "router.capacity_factor=0.0 must be at least 0.01"),
        ({"capacity_factor": math.nan}, "router.capacity_factor=nan must be at least 0.01"),
        ({"min_capacity": -1}, "router.min_capacity=-1 must be at least 0"),
        ({"aux_loss_coef": -1.0}, "router.aux_loss_coef=-1.0 must be at least 0"),
        ({"z_loss_coef": -1.0}, "router.z_loss_coef=-1.0 must be at least 0"),
        ({"group_sequences": 0}, "router.group_sequences=0 must be at least 1"),
        ({"sinkhorn_iterations": 0}, "router.sinkhorn_iterations=0 must be at least 1"),
        ({"sinkhorn_tolerance": -1.0}, "router.sinkhorn_tolerance=-1.0 must be at least 0"),
        ({"bias_rate": -0.1}, "router.bias_rate=-0.1 must be at least 0"),
        ({"threshold_warmup": -1}, "router.threshold_warmup=-1 must be at least 0"),
        ({"residual_depth": -1}, "router.residual_depth=-1 must be at least 0"),
        ({"margin_coef": -0.5}, "router.margin_coef=-0.5 must be at least 0"),
        ({"margin_anneal_start": -1.0}, "router.margin_anneal_start=-1.0 must be at least 0"),
        ({"margin_anneal_floor": math.nan}, "router.margin_anneal_floor=nan must be at least 0"),
        ({"margin": 5}, "router.margin=5 must be 1, 2, 3 or 4"),
        ({"jitter": 1.0}, "router.jitter=1.0 must be at least 0 and below 1"),
        ({"threshold_decay": 1.0}, "router.threshold_decay=1.0 must be at least 0 and below 1"),
        (
            {"margin_anneal_decay": -0.1},
            "router.margin_anneal_decay=-0.1 must be at least 0 and below 1",
        ),
    ],
)
def test_a_router_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        RouterSpec(**change)
