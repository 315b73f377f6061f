"""gptmoe models, gptmoe verify: the sizes that have a name; whether a checkpoint is intact."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gptmoe.model.counts import parameters
from gptmoe.model.presets import PRESETS, Preset

from . import lazy
from .output import Json, examples, print_facts

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog=examples("gptmoe models", "gptmoe models --json"))
def models(json: Json = False) -> None:
    """List the model presets with their sizes and recipes.

    Any dense size takes any number of experts: model.preset=1.3B+MoE-64.
    """
    facts = [describe(name, preset) for name, preset in PRESETS.items()]
    print_facts(facts, draw(facts), as_json=json)


@app.command(epilog=examples("gptmoe verify runs/tiny", "gptmoe verify runs/tiny --json"))
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder, or a run's.")],
    json: Json = False,
) -> None:
    """Read all of a checkpoint and compare checksums; exit code 2 names the file at fault.

    Loading without it (verify=false) checks that every file is there with its size.
    """
    opened = lazy.gptmoe_checkpoint().open_checkpoint(checkpoint, verify=True)
    files = opened.manifest.files
    facts = {
        "checkpoint": str(opened.path),
        "files": len(files),
        "tensors": sum(len(tensors) for tensors in opened.manifest.groups.values()),
        "bytes": sum(record.size_bytes for record in files.values()),
    }
    drawing = (
        f"{facts['checkpoint']} is intact: {facts['files']} files, {facts['tensors']} tensors, "
        f"{facts['bytes'] / 1e9:.3f} GB"
    )
    print_facts(facts, drawing, as_json=json)


def describe(name: str, preset: Preset) -> dict[str, Any]:
    """One preset as plain data; `num_experts` is 0, one number, or one number per MoE layer."""
    spec, count = preset.spec, parameters(preset.spec)
    numbers = sorted(set(spec.num_experts))
    return {
        "name": name,
        "parameters": count.total,
        "active_parameters": count.active,
        "num_layers": spec.num_layers,
        "d_model": spec.d_model,
        "num_heads": spec.num_heads,
        "num_experts": list(spec.num_experts) if len(numbers) > 1 else sum(numbers),
        "learning_rate": preset.learning_rate,
        "batch_tokens": preset.batch_tokens,
    }


def draw(facts: list[dict[str, Any]]) -> Table:
    """The same as a table."""
    columns = ("name", "params", "active", "layers", "width", "heads", "experts", "lr", "batch")
    table = Table(*columns, box=None)
    for row in facts:
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e9:.2f}B",
            f"{row['active_parameters'] / 1e9:.2f}B",
            str(row["num_layers"]),
            str(row["d_model"]),
            str(row["num_heads"]),
            str(row["num_experts"]),
            f"{row['learning_rate']:g}",
            f"{row['batch_tokens'] / 2**20:g}M",
        )
    return table
