"""gptmoe demo: the whole path once, from a corpus to a streamed poem."""

import importlib
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from cluster.demo.plan import BUNDLED, DemoPlan
from gptmoe.errors import ConfigError, DataError

from .output import err, examples

app = typer.Typer(rich_markup_mode=None)


@app.command(
    epilog=examples(
        "gptmoe demo",
        "gptmoe demo --data my_poems.tsv --minutes 20 --prompt 春风",
        "gptmoe demo --data poems.tsv --minutes 20 train.dtype=bfloat16",
    )
)
def demo(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]", help="For the pretraining.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Your own lines, one text each; default: bundled poems.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for all results.")] = Path("runs/demo"),
    minutes: Annotated[
        float | None,
        typer.Option(help="Minutes of training; default: a few seconds' worth, or 3 with --data."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the poem begins with.")] = "春风",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    keep: Annotated[
        bool | None,
        typer.Option("--keep/--no-keep", help="Serve on until Ctrl-C; default: on a terminal."),
    ] = None,
) -> None:
    """Tokenizer, pretraining, finetuning, serving, one streamed poem, and a summary."""
    plan = _plan(data, output, minutes, tuple(overrides or ()))
    console = err()
    began_s = time.monotonic()
    run = importlib.import_module("cluster.demo.run").DemoRun(plan, console)
    summary = importlib.import_module("cluster.demo.summary")
    run.train()
    with run.served() as endpoints:
        answer = run.ask(endpoints["grpc"], prompt, max_new_tokens)
        summary.show(run.summary(answer, endpoints, began_s), console)
        if sys.stdin.isatty() if keep is None else keep:
            console.print("\nServing until Ctrl-C.")
            _wait()


def _plan(
    data: Path | None, output: Path, minutes: float | None, overrides: tuple[str, ...]
) -> DemoPlan:
    if data is not None and not data.is_file():
        raise DataError(f"--data {data} is not a file; name a .tsv, .txt, .jsonl or .parquet file")
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"--minutes {minutes:g} must be above 0")
    if data is not None and minutes is None:
        minutes = 3.0
    source = (data or BUNDLED).absolute()
    return DemoPlan(data=source, output=output.absolute(), minutes=minutes, overrides=overrides)


def _wait() -> None:
    try:
        while True:
            time.sleep(1.0)
    except KeyboardInterrupt:
        return
