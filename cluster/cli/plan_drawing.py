"""Plans for people, in rich: what was chosen, what it needs, what it takes, what lost and why."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.planner.devices import GIGA, TERA

MEMORY = {
    "weights": "float32, what the optimizer updates",
    "gradients": "float32",
    "moments": "Adam's two averages, float32",
    "master_copy": "ZeRO's flat copy of its part of the weights",
    "cast_weights": "bfloat16 copies that the backward pass reads again",
    "activations": "kept from forward to backward, all microbatches in flight",
    "working": "the layer at work, and gradients of its activations",
    "logits": "scores over the vocabulary and their gradient",
    "buffers": "buckets of gradients under way",
}
"""What each item is; what of it is shared over which ranks is in cluster/planner/README.md."""

TIME = {
    "compute": "products, memory traffic, recompute",
    "tensor": "all-gathers and reduce-scatters around each layer",
    "expert": "all-to-all: rows to their experts and back",
    "sends": "activations and gradients between stages",
    "bubble": "waiting for the pipeline to fill and drain",
    "weights": "ZeRO 3: weights gathered, gradients scattered",
    "gradients": "summed over the ranks with the same weights",
    "optimizer": "norm, clipping, Adam",
}


def draw_plan(facts: Mapping[str, Any]) -> RenderableType:
    """The best plan, item by item, and the runners-up."""
    memory, time = facts["memory_bytes"], facts["step_time_s"]
    usable = facts["usable_bytes"]
    parts: list[RenderableType] = [
        _head(facts),
        Text(_words(facts), style="bold"),
        Text(f"microbatches a rank and step: {facts['microbatches']}; idle: {_idle(facts)}"),
        Text(f"\nmemory of the fullest rank: {memory['total'] / GIGA:.1f} of {_gb(usable)} usable"),
        _memory_table(memory),
        Text(
            f"\na step: {_seconds(time['total'])}, {facts['tokens_per_s']:,.0f} tokens/s, "
            f"{facts['utilization']:.1%} of the peak; bubble {facts['bubble']:.1%} of the work"
        ),
        _time_table(time, facts["sent_bytes"]),
    ]
    if facts["runners_up"]:
        parts += [Text(f"\nnot chosen, of {facts['layouts_seen']} layouts"), _lost(facts)]
    parts.append(Text(f"\ngptmoe pretrain CONFIG {' '.join(facts['overrides'])}"))
    return Group(*parts)


def draw_equal_cost(facts: Mapping[str, Any]) -> RenderableType:
    """The dense model, the sparse ones for its price, the others."""
    parts: list[RenderableType] = [_head(facts), Text(_words(facts), style="bold")]
    equal, others = facts["equal_cost"], facts["other_costs"]
    if most := facts["most_parameters"]:
        parts.append(
            Text(
                f"\nfor about its cost per token or less: {most['parameters'] / 1e9:.1f}B "
                f"parameters, {most['model']} at {most['cost']:.2f} of the cost"
            )
        )
    for title, rows in (("the same cost", equal), ("other costs, the nearest first", others)):
        if rows:
            parts += [Text(f"\n{title}"), _sparse(rows)]
    if facts["too_large"]:
        parts.append(Text(f"\ndo not fit: {', '.join(facts['too_large'])}"))
    return Group(*parts)


def _head(facts: Mapping[str, Any]) -> Text:
    cluster = facts["cluster"]
    return Text(
        f"{facts['model']}: {facts['parameters'] / 1e9:.2f}B parameters, "
        f"{facts['active_parameters'] / 1e9:.2f}B of them at work for a token\n"
        f"{cluster['num_devices']} x {cluster['device']}: "
        f"{_gb(cluster['device_memory_bytes'])}, {cluster['device_flops_per_s'] / TERA:g} TFLOP/s "
        f"({facts['dtype']}), {cluster['devices_per_node']} a node, "
        f"links {cluster['link_bytes_per_s'] / GIGA:g} and "
        f"{cluster['network_bytes_per_s'] / GIGA:g} GB/s\n"
        f"batch {facts['batch_tokens']:,} tokens in sequences of {facts['seq_len']:,}\n"
    )


def _words(facts: Mapping[str, Any]) -> str:
    words = [f"{name}={value}" for name, value in facts["layout"].items()]
    words += [f"{name}={facts[name]}" for name in ("zero", "recompute", "microbatch_size")]
    return " ".join([*words, _schedule(facts)]).rstrip()


def _schedule(facts: Mapping[str, Any]) -> str:
    if facts["layout"]["pp"] == 1:
        return ""
    return facts["schedule"] + (f" x{facts['chunks']}" if facts["chunks"] > 1 else "")


def _idle(facts: Mapping[str, Any]) -> str:
    idle, devices = facts["idle_devices"], facts["cluster"]["num_devices"]
    return f"{idle} of {devices} devices" if idle else "no device"


def _memory_table(memory: Mapping[str, float]) -> Table:
    table = _table("item", "GB", "what it is", right=(1,))
    for name, what in MEMORY.items():
        if memory[name]:
            table.add_row(name.replace("_", " "), f"{memory[name] / GIGA:.2f}", what)
    return table


def _time_table(time: Mapping[str, float], sent: Mapping[str, float]) -> Table:
    table = _table("item", "time", "share", "sent", "what it is", right=(1, 2, 3))
    for name, what in TIME.items():
        if time[name]:
            share = f"{time[name] / time['total']:.1%}"
            moved = _gb(sent[name]) if sent.get(name) else ""
            table.add_row(name, _seconds(time[name]), share, moved, what)
    return table


def _lost(facts: Mapping[str, Any]) -> Table:
    columns = ("dp", "tp", "ep", "pp", "zero", "recompute", "microbatch", "schedule")
    table = _table(*columns, "step", "memory", "why not", right=(0, 1, 2, 3, 4, 6, 8, 9))
    for row in facts["runners_up"]:
        table.add_row(
            *map(str, row["layout"].values()),
            str(row["zero"]),
            row["recompute"],
            str(row["microbatch_size"]),
            _schedule(row),
            _seconds(row["step_time_s"]),
            _gb(row["memory_bytes"]),
            row["reason"],
        )
    return table


def _sparse(rows: list[Mapping[str, Any]]) -> Table:
    table = _table("model", "params", "active", "cost", "tokens/s", "plan", right=(1, 2, 3, 4))
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['parameters'] / 1e9:.1f}B",
            f"{row['active_parameters'] / 1e9:.2f}B",
            f"{row['cost']:.2f}",
            f"{row['tokens_per_s']:,.0f}",
            _words(row),
        )
    return table


def _table(*columns: str, right: tuple[int, ...] = ()) -> Table:
    table = Table(box=None)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left")
    return table


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GIGA:.1f} GB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
