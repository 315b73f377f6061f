"""gptmoe plan: the layout to train with, its memory and time, before a device is rented."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cluster.planner.candidates import Wishes
from cluster.planner.devices import GIGA, MACHINES, TERA, Cluster, machine
from cluster.planner.equal_cost import equal_cost as compare_costs
from cluster.planner.facts import equal_cost_facts, plan_facts
from cluster.planner.job import Job
from cluster.planner.live import devices_of
from cluster.planner.models import Subject, by_config, by_name, vocabulary_missing
from cluster.planner.search import search
from cluster.resolve import resolve
from gptmoe.errors import ConfigError
from gptmoe.model.presets import ALIASES, PRESETS

from . import lazy
from .output import Json, bar, examples, print_facts
from .plan_drawing import draw_equal_cost, draw_plan

app = typer.Typer(rich_markup_mode=None)

DEFAULT_DEVICE = "a100-80gb"

Model = Annotated[
    str, typer.Option(metavar="NAME|FILE", help="A preset, or a TOML file of configs/train/.")
]
Devices = Annotated[int | None, typer.Option(min=1, max=4096, help="How many there are.")]
DeviceName = Annotated[str, typer.Option(help=f"One of {', '.join(MACHINES)}.")]
Address = Annotated[
    str, typer.Option(help="Count the devices of this Ray cluster, as http://HEAD:8265.")
]
MemoryGb = Annotated[
    float | None, typer.Option(metavar="GB", help="Memory of a device, 10^9 bytes.")
]
Tflops = Annotated[
    float | None, typer.Option(metavar="N", help="Peak rate of its products, 10^12 a second.")
]
PerNode = Annotated[int | None, typer.Option(min=1, metavar="N", help="Devices of a node.")]
LinkGbS = Annotated[
    float | None, typer.Option(metavar="GB/S", help="Within a node, a device, one direction.")
]
NetworkGbS = Annotated[
    float | None, typer.Option(metavar="GB/S", help="Between nodes, a device, one direction.")
]
BatchTokens = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Of one step; default: the preset's.")
]
SeqLen = Annotated[int | None, typer.Option(min=2, metavar="N", help="Default: the preset's.")]
DtypeName = Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="Of the products.")]
Fixed = Annotated[int | None, typer.Option(min=1, metavar="N", help="Fix it; else the best.")]
Zero = Annotated[int | None, typer.Option(min=0, max=3, metavar="0-3", help="Fix it.")]
RecomputeName = Annotated[Literal["none", "sel", "full"] | None, typer.Option(help="Fix it.")]
ScheduleName = Annotated[
    Literal["gpipe", "1f1b", "interleaved"] | None, typer.Option(help="Fix it (pp > 1).")
]
EqualCostFlag = Annotated[
    bool, typer.Option("--equal-cost", help="Which sparse models cost as much per token?")
]


@app.command(
    epilog=examples(
        "gptmoe plan --model 1.3B+MoE-64 --devices 8 --device-memory-gb 80",
        "gptmoe plan --model 2.7B+MoE-64 --devices 64 --device h100-80gb --pp 4 --json",
        "gptmoe plan --model configs/train/tiny.toml --devices 2 --device cpu",
        "gptmoe plan --model 1.3B --devices 8 --equal-cost",
        "gptmoe plan --model 1.3B+MoE-64 --address http://head:8265",
    )
)
def plan(
    model: Model,
    devices: Devices = None,
    device: DeviceName = "",
    address: Address = "",
    device_memory_gb: MemoryGb = None,
    device_tflops: Tflops = None,
    devices_per_node: PerNode = None,
    link_gb_s: LinkGbS = None,
    network_gb_s: NetworkGbS = None,
    batch_tokens: BatchTokens = None,
    seq_len: SeqLen = None,
    dtype: DtypeName = None,
    dp: Fixed = None,
    tp: Fixed = None,
    ep: Fixed = None,
    pp: Fixed = None,
    zero: Zero = None,
    recompute: RecomputeName = None,
    microbatch_size: Fixed = None,
    schedule: ScheduleName = None,
    chunks: Fixed = None,
    equal_cost: EqualCostFlag = False,
    json: Json = False,
) -> None:
    """Find the fastest layout that fits: dp, tp, ep, pp, ZeRO, recompute, microbatch.

    By arithmetic alone: nothing is run, and no device is needed.
    """
    cluster = make_cluster(devices, device, address)
    cluster = described(
        cluster, device_memory_gb, device_tflops, devices_per_node, link_gb_s, network_gb_s
    )
    subject = _subject(model)
    wishes = Wishes(
        dp=dp,
        tp=tp,
        ep=ep,
        pp=pp,
        zero=zero,
        recompute=recompute,
        microbatch_size=microbatch_size,
        schedule=schedule,
        chunks=chunks,
    )
    job = subject.job(
        batch_tokens=batch_tokens,
        seq_len=seq_len,
        dtype=dtype,
        fused_attention=cluster.device.fused_attention,
    )
    facts, drawing = _answer(subject.name, job, cluster, wishes, compare=equal_cost)
    print_facts(facts, drawing, as_json=json)


def _answer(
    name: str, job: Job, cluster: Cluster, wishes: Wishes, *, compare: bool
) -> tuple[dict[str, Any], Any]:
    if not compare:
        facts = plan_facts(name, job, cluster, search(job, cluster, wishes))
        return facts, draw_plan(facts)
    bases = {key: row.spec for key, row in PRESETS.items() if key not in ALIASES}
    with bar("planning") as progress:
        task = progress.task_ids[0]
        found = compare_costs(
            job,
            bases,
            cluster,
            wishes=wishes,
            on_progress=lambda share: progress.update(task, completed=share),
        )
    facts = equal_cost_facts(name, job, cluster, found)
    return facts, draw_equal_cost(facts)


def make_cluster(devices: int | None, device: str, address: str) -> Cluster:
    """The devices asked for, or those of a Ray cluster."""
    if not address:
        if devices is None:
            raise ConfigError(
                "plan wants to know what it plans for: give --devices N, or the --address of a "
                "Ray cluster"
            )
        return machine(device or DEFAULT_DEVICE).cluster(devices)
    found = devices_of(lazy.dashboard().Dashboard(address).resources())
    name = device or found.device
    if name is None:
        raise ConfigError(
            f"the Ray cluster at {address} does not say what its {found.num_devices} devices are; "
            f"name them with --device, one of {', '.join(MACHINES)}"
        )
    cluster = machine(name).cluster(devices or found.num_devices)
    cluster = replace(cluster, devices_per_node=found.devices_per_node)
    if found.memory_bytes:
        cluster = replace(cluster, device=replace(cluster.device, memory_bytes=found.memory_bytes))
    return cluster


def described(
    cluster: Cluster,
    memory_gb: float | None,
    tflops: float | None,
    devices_per_node: int | None,
    link_gb_s: float | None,
    network_gb_s: float | None,
) -> Cluster:
    """With what the command line says about devices and links."""
    device: dict[str, Any] = {}
    if memory_gb is not None:
        device["memory_bytes"] = memory_gb * GIGA
    if tflops is not None:
        device |= {"bfloat16_flops_per_s": tflops * TERA, "float32_flops_per_s": tflops * TERA}
    changes: dict[str, Any] = {"device": replace(cluster.device, **device)}
    if devices_per_node is not None:
        changes["devices_per_node"] = devices_per_node
    if link_gb_s is not None:
        changes["link_bytes_per_s"] = link_gb_s * GIGA
    if network_gb_s is not None:
        changes["network_bytes_per_s"] = network_gb_s * GIGA
    return replace(cluster, **changes)


def _subject(model: str) -> Subject:
    """A preset by its name, or a training config; its tokenizer is read if it says the size."""
    if not model.endswith(".toml"):
        return by_name(model)
    config = resolve("pretrain", Path(model), []).config
    vocabulary = 0
    if vocabulary_missing(config) and config["data"].get("tokenizer"):
        vocabulary = lazy.gptmoe_text().load_tokenizer(config["data"]["tokenizer"]).vocab_size
    return by_config(model, config, vocabulary)
