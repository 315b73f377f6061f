"""The demo's closing page: what was learned, by whom, how fast, and how to go on."""

import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.figure
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster import topology_file
from cluster.drawing import draw_topology
from cluster.messages import Topology
from gptmoe import metrics

from .plan import DemoPlan

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer and how long it took."""

    prompt: str
    text: str
    tokens: int
    first_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything that the closing page shows."""

    plan: DemoPlan
    pretrain: Sequence[dict[str, Any]]
    finetune: Sequence[dict[str, Any]]
    topology: Topology | None
    answer: Answer
    endpoints: dict[str, Any]
    seconds: float

    @classmethod
    def collect(
        cls, plan: DemoPlan, answer: Answer, endpoints: dict[str, Any], seconds: float
    ) -> "Summary":
        """Read the runs' folders."""
        return cls(
            plan=plan,
            pretrain=metrics.read(plan.pretrain_dir / "metrics.jsonl"),
            finetune=metrics.read(plan.finetune_dir / "metrics.jsonl"),
            topology=topology_file.read(plan.pretrain_dir),
            answer=answer,
            endpoints=endpoints,
            seconds=seconds,
        )

    @property
    def curve_path(self) -> Path:
        """Where the plot is."""
        return self.plan.output / "loss.png"


def show(summary: Summary, console: Console) -> None:
    """Draw the plot and print the page."""
    draw_curve(summary.pretrain, summary.finetune, summary.curve_path)
    console.rule("gptmoe demo")
    console.print(Group(*_parts(summary)))


def _parts(summary: Summary) -> list[RenderableType]:
    numbers = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, records in (("pretraining", summary.pretrain), ("finetuning", summary.finetune)):
        numbers.add_row(name, *_training_row(records))
    answer = summary.answer
    speed = answer.tokens / max(answer.total_s, 1e-9)
    numbers.add_row(
        "generation",
        f"{answer.first_s * 1000:.0f} ms to the first token",
        f"{speed:.0f} tokens/s",
        "",
    )
    parts: list[RenderableType] = [numbers, Text(f"\nloss curve    {summary.curve_path}")]
    parts += _load(summary.pretrain)
    if summary.topology is not None:
        parts += [
            Text("\nwho owned what in pretraining"),
            draw_topology(summary.topology, running=False),
        ]
    parts += [
        Text(f"\nthe poem      {answer.prompt}{answer.text}", style="bold"),
        *_how_to(summary),
    ]
    return parts


def _training_row(records: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
    losses = [record["loss"] for record in records if "loss" in record]
    speeds = [record["tokens_per_s"] for record in records if "tokens_per_s" in record]
    bits = [record["bits_per_char"] for record in records if "bits_per_char" in record]
    bits_text = f"{bits[-1]:.2f} bits per character (validation)" if bits else ""
    median = statistics.median(speeds) if speeds else 0.0
    curve = f"{sparkline(losses)} loss {losses[0]:.2f} to {losses[-1]:.2f}" if losses else ""
    return curve, f"{median:,.0f} tokens/s", bits_text


def _load(records: Sequence[dict[str, Any]]) -> list[RenderableType]:
    """Rows that each expert was chosen for, over the last tenth of the steps."""
    loads = [record["expert_load"] for record in records if "expert_load" in record]
    if not loads:
        return []
    recent = loads[-max(1, len(loads) // 10) :]
    totals = [sum(column) for column in zip(*recent, strict=True)]
    share = " ".join(f"{index}:{total / sum(totals):.0%}" for index, total in enumerate(totals))
    return [Text(f"expert load   {sparkline(totals, floor=0)}  {share}")]


def _how_to(summary: Summary) -> list[RenderableType]:
    checkpoint, prompt = shlex.quote(str(summary.plan.finetune_dir)), summary.answer.prompt
    grpc, http = summary.endpoints["grpc"], summary.endpoints["http"]
    body = f'{{"inputs": ["{prompt}"], "parameters": {{"max_length": 64, "top_k": 5}}}}'
    lines = [
        f"dashboard     {summary.endpoints['dashboard']}  (while it serves)",
        f"took          {summary.seconds:.0f} s",
        "",
        "call it yourself",
        f"  gptmoe serve --checkpoint {checkpoint}",
        f"  gptmoe generate {prompt} --target {grpc} --stream",
        f"  curl {http}/generate -H 'content-type: application/json' -d '{body}'",
        f"  tensorboard --logdir {shlex.quote(str(summary.plan.output))}",
    ]
    return [Text("\n" + "\n".join(lines))]


def sparkline(values: Sequence[float], width: int = 20, floor: float | None = None) -> str:
    """Values as at most `width` bars, each the mean of its part; the lowest bar is `floor`."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [round(index * len(values) / width) for index in range(width + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in pairwise(edges)]
    low, high = min(means) if floor is None else floor, max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def draw_curve(
    pretrain: Sequence[dict[str, Any]], finetune: Sequence[dict[str, Any]], path: Path
) -> None:
    """Write the two runs' training and validation losses as a PNG."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name, records in zip(
        axes, ("pretraining", "finetuning"), (pretrain, finetune), strict=True
    ):
        train = [(r["step"], r["lm_loss"]) for r in records if "lm_loss" in r]
        validation = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
        axis.plot(*zip(*train, strict=True), label="training", linewidth=1) if train else None
        axis.plot(*zip(*validation, strict=True), "o-", label="validation") if validation else None
        axis.set(title=name, xlabel="step", ylabel="loss (nats per token)")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
