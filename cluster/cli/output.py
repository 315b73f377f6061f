"""Where a command prints: facts to stdout, progress and complaints to stderr."""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_PIPE_WIDTH = 160

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
"""The option that every command with facts to print has."""


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def out() -> Console:
    """Facts. A pipe has no width: tables get room there."""
    wide = None if sys.stdout.isatty() else _PIPE_WIDTH
    return Console(width=wide, soft_wrap=True, highlight=False, markup=False, emoji=False)


def err() -> Console:
    """Progress and complaints."""
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def print_facts(facts: Any, drawing: RenderableType, *, as_json: bool) -> None:
    """Print plain data as JSON, or its drawing."""
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False, indent=2))
    else:
        out().print(drawing)


def print_live(pairs: Iterable[tuple[Any, RenderableType]], *, as_json: bool) -> None:
    """Draw facts anew as they come, until Ctrl-C; JSON: one line each."""
    console = out()
    with contextlib.suppress(KeyboardInterrupt):
        if console.is_terminal and not as_json:
            with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
                for _, drawing in pairs:
                    live.update(drawing, refresh=True)
        for facts, drawing in pairs:
            if as_json:
                typer.echo(json.dumps(facts, ensure_ascii=False))
            else:
                console.print(drawing)


@contextmanager
def bar(label: str) -> Iterator[Progress]:
    """A progress bar on stderr; nothing where that is not a terminal."""
    console = err()
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        progress.add_task(label, total=1.0, numbers="")
        yield progress
