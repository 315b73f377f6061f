"""What a plan is for: devices of a Ray cluster, presets, configs."""

from typing import Any

import pytest

from cluster.planner.devices import MACHINES, machine
from cluster.planner.live import devices_of
from cluster.planner.models import by_config, by_name, vocabulary_missing
from gptmoe.model.presets import PRESETS, preset
from gptmoe.model.spec import RouterSpec

PARTS: dict[str, Any] = {
    "model": {"preset": "", "num_layers": 4, "d_model": 96, "num_heads": 12, "num_experts": 12},
    "data": {"seq_len": 64},
    "train": {"batch_tokens": 3072, "dtype": "float32"},
    "router": {"group_sequences": 4},
}


def test_gpus_of_a_ray_cluster() -> None:
    resources = {"CPU": 128.0, "GPU": 16.0, "accelerator_type:H100": 2.0, "node:10.0.0.1": 1.0}
    found = devices_of(resources | {"node:10.0.0.2": 1.0, "node:__internal_head__": 1.0})
    assert (found.num_devices, found.device, found.devices_per_node) == (16, "h100-80gb", 8)
    assert found.memory_bytes is None
    unknown = devices_of({"GPU": 2.0, "accelerator_type:X1": 1.0, "node:a": 1.0})
    assert (unknown.num_devices, unknown.device) == (2, None)
    assert devices_of({"NPU": 8.0, "accelerator_type:Ascend910B": 1.0}).device == "910b-64gb"


def test_cpus_of_a_ray_cluster() -> None:
    found = devices_of({"CPU": 4.0, "memory": 8e9, "node:a": 1.0})
    assert (found.num_devices, found.device, found.devices_per_node) == (4, "cpu", 4)
    assert found.memory_bytes == 2e9
    assert devices_of({"CPU": 4.0}).memory_bytes is None


@pytest.mark.parametrize("name", MACHINES)
def test_every_device_makes_a_cluster(name: str) -> None:
    made = machine(name).cluster(16)
    assert (made.num_devices, made.device.name) == (16, name)
    assert made.network_bytes_per_s <= made.link_bytes_per_s


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_brings_its_batch(name: str) -> None:
    job = by_name(name).job()
    assert (job.spec, job.batch_tokens) == (preset(name).spec, preset(name).batch_tokens)
    changed = by_name(name).job(batch_tokens=65536, seq_len=1024, dtype="float32")
    assert (changed.batch_sequences, changed.seq_len, changed.dtype) == (64, 1024, "float32")


def test_a_config_of_parts() -> None:
    subject = by_config("tiny.toml", PARTS, 3072)
    spec = subject.spec
    assert (spec.d_ff, spec.vocab_size, spec.max_seq_len, spec.num_experts) == (
        384, 3072, 64, (12, 12),
    )  # fmt: skip
    assert spec.router == RouterSpec(group_sequences=4)
    assert (subject.job().batch_sequences, subject.dtype) == (48, "float32")
    assert vocabulary_missing(PARTS)
    assert not vocabulary_missing({"model": {"preset": "1.3B"}})


def test_a_config_of_a_preset_with_parts_replaced() -> None:
    config = PARTS | {"model": {"preset": "1.3B+MoE-64", "d_model": 1024, "vocab_size": 99}}
    config["train"] = {}
    subject = by_config("my.toml", config)
    assert (subject.spec.d_ff, subject.spec.vocab_size) == (4096, 99)
    assert subject.spec.num_experts == (64,) * 12
    assert subject.batch_tokens == preset("1.3B+MoE-64").batch_tokens


def test_experts_one_by_one() -> None:
    config = PARTS | {"model": PARTS["model"] | {"num_experts": [4, 8]}}
    assert by_config("my.toml", config, 3072).spec.num_experts == (4, 8)
