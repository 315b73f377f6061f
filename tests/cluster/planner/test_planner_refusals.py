"""Every sentence with which the planner refuses: what was wanted, what is there, what would do."""

import re
from dataclasses import replace
from typing import Any

import pytest

from cluster.planner.candidates import Wishes
from cluster.planner.devices import Cluster, machine
from cluster.planner.job import Choice, Job, check
from cluster.planner.live import devices_of
from cluster.planner.models import by_config, by_name
from cluster.planner.search import search
from gptmoe.errors import ClusterError, ConfigError, LayoutError
from gptmoe.model.presets import preset
from gptmoe.parallel.layout import Layout

MIXTURE = Job(spec=preset("1.3B+MoE-64").spec, batch_sequences=512, seq_len=2048)
DENSE = Job(spec=preset("1.3B").spec, batch_sequences=512, seq_len=2048)


def refused(error: type[Exception], sentence: str) -> Any:
    """The error, with this in its message."""
    return pytest.raises(error, match=re.escape(sentence))


def cluster(devices: int, memory_gb: float = 80.0) -> Cluster:
    made = machine("a100-80gb").cluster(devices)
    return replace(made, device=replace(made.device, memory_bytes=memory_gb * 1e9))


@pytest.mark.parametrize(
    ("job", "wishes", "expected"),
    [
        (MIXTURE, Wishes(tp=3), "parallel.tp=3 must divide num_heads=32, d_ff=8192 and seq_len"),
        (MIXTURE, Wishes(tp=3), "use 1, 2, 4, 8, 16 or 32"),
        (MIXTURE, Wishes(ep=5), "parallel.ep=5 must divide num_experts=64; use 1, 2, 4"),
        (DENSE, Wishes(ep=2), "parallel.ep=2 needs experts, but the model is dense"),
        (
            MIXTURE,
            Wishes(pp=25),
            "parallel.pp=25 x parallel.chunks=1 need as many layers, but model.num_layers=24",
        ),
        (MIXTURE, Wishes(dp=3), "dp=3 x microbatch_size=8 must divide the batch of 512 sequences"),
        (MIXTURE, Wishes(dp=3), "use dp 1, 2, 4, 8, 16, 32 or 64"),
        (MIXTURE, Wishes(microbatch_size=4), "must be a multiple of router.group_sequences=8"),
        (DENSE, Wishes(microbatch_size=3), "use a smaller microbatch_size, or another batch"),
        (DENSE, Wishes(microbatch_size=0), "microbatch_size=0 must be at least 1"),
        (MIXTURE, Wishes(dp=4, tp=2, pp=2), "dp=4 x tp=2 x pp=2 asks for 16 ranks, found 8 dev"),
        (MIXTURE, Wishes(dp=2, tp=2, ep=8), "parallel.ep=8 must divide parallel.dp x parallel.tp"),
        (MIXTURE, Wishes(zero=2, pp=2), "parallel.zero=2 splits gradients, which parallel.pp=2"),
        (MIXTURE, Wishes(zero=3), "parallel.zero=3 is for dense models with dp alone"),
        (MIXTURE, Wishes(zero=4), "parallel.zero=4 is not known; use 0, 1, 2 or 3"),
        (MIXTURE, Wishes(ep=64), "no layout of at most 8 ranks has ep=64; dp can be 1, 2, 4"),
        (DENSE, Wishes(pp=5, schedule="interleaved"), "has pp=5 schedule=interleaved; dp can be"),
        (replace(MIXTURE, batch_sequences=12), Wishes(), "use 16 sequences (32768 tokens)"),
    ],
)
def test_wishes_that_cannot_be_met(job: Job, wishes: Wishes, expected: str) -> None:
    with refused(LayoutError, expected):
        search(job, cluster(8), wishes)


def test_a_choice_by_itself() -> None:
    plain = Choice(layout=Layout(pp=2), microbatch_size=8)
    with refused(LayoutError, "parallel.chunks=2 needs parallel.schedule='interleaved'"):
        check(DENSE, replace(plain, layout=Layout(pp=2, chunks=2)))
    with refused(LayoutError, "microbatch_size=0 must be at least 1; use 1"):
        check(DENSE, replace(plain, microbatch_size=0))


def test_not_enough_memory_names_the_item_and_what_would_fit() -> None:
    with pytest.raises(LayoutError) as caught:
        search(MIXTURE, cluster(1))
    message = str(caught.value)
    assert message.startswith("not enough memory on 1 x a100-80gb of 80.0 GB: the smallest plan")
    assert "213.6 of it moments; use 8 devices or more, or devices of at least" in message
    least_gb = float(re.findall(r"at least ([0-9]+) GB", message)[0])
    assert search(MIXTURE, cluster(1, least_gb)).best.fits
    with pytest.raises(LayoutError):
        search(MIXTURE, cluster(1, least_gb - 1))
    assert search(MIXTURE, cluster(8)).best.fits
    with pytest.raises(LayoutError):
        search(MIXTURE, cluster(4))


def test_not_enough_memory_however_many_devices() -> None:
    with refused(LayoutError, "; use devices of at least"):
        search(MIXTURE, cluster(8, 2.0))


def test_jobs_without_a_sense() -> None:
    with refused(LayoutError, "holds 0 sequences of data.seq_len=2048"):
        replace(DENSE, batch_sequences=0)
    with refused(LayoutError, "data.seq_len=4096 must be 2 to the model's max_seq_len"):
        replace(DENSE, seq_len=4096)
    with refused(ConfigError, "train.batch_tokens=3000 must be whole sequences"):
        by_name("1.3B").job(batch_tokens=3000)


def test_devices() -> None:
    with refused(ConfigError, "--device a100 is not known; did you mean a100-"):
        machine("a100")
    with refused(ConfigError, "--device zzz is not known; known: a100-40gb"):
        machine("zzz")
    with refused(ConfigError, "device.memory_bytes=-8e+10 must be above 0"):
        cluster(8, -80)
    with refused(ConfigError, "cluster.num_devices=0 must be above 0"):
        cluster(0)


def test_configs() -> None:
    config = {"model": {"checkpoint": "runs/a"}, "data": {"seq_len": 64}, "train": {}}
    with refused(ConfigError, "my.toml takes its model from model.checkpoint=runs/a"):
        by_config("my.toml", config)
    config = {"model": {"num_layers": 1, "d_model": 8, "num_heads": 1}} | config
    config["model"] = {"num_layers": 1, "d_model": 8, "num_heads": 1}
    with refused(ConfigError, "my.toml has no train.batch_tokens; give it, or --batch"):
        by_config("my.toml", config, 100)


def test_a_cluster_of_nothing() -> None:
    with refused(ClusterError, "declares no GPU, NPU or CPU; add nodes"):
        devices_of({"memory": 1e9})
