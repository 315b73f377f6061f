"""gptmoe study routers: python -m train.study as an attached child, its progress drawn."""

import json as jsons
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster import env
from cluster.child import Child
from cluster.resolve import resolve, split_words
from gptmoe.errors import ConfigError

from .output import Json, bar, err, examples, print_facts

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

_POLL_S = 0.2
_PAUSED = 75


@app.callback()
def study() -> None:
    """Compare ways to build a model."""


@app.command(
    epilog=examples(
        "gptmoe study routers configs/study/small.toml --dry-run",
        "gptmoe study routers configs/study/small.toml --data poems.tsv.gz --validation dev.tsv",
        "gptmoe study routers configs/study/headline.toml --data corpus/ --minutes 10",
        "gptmoe study routers my.toml study.dir=/shared/study --address http://head:8265",
    )
)
def routers(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A TOML file, see configs/study.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]", help="As study.dir=DIR.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Learn from this file or folder; may be repeated.")
    ] = None,
    validation: Annotated[
        list[Path] | None, typer.Option(help="Validate on this; default: a part of --data.")
    ] = None,
    address: Annotated[
        str, typer.Option(help="Each run a job on this Ray cluster; else plain processes.")
    ] = "",
    minutes: Annotated[
        float | None, typer.Option(help="Pause after so many; exit code 75 if more is to do.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print sizes, FLOPs and estimated time.")
    ] = False,
    json: Json = False,
) -> None:
    """Train the same model with different routers, and write a page about it.

    Arms cost the same FLOPs a token and see the same samples. Started again, what is finished stays
    and the rest goes on. The page is page.md in study.dir.
    """
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"--minutes {minutes:g} must be above 0")
    words = [
        config,
        *(overrides or []),
        *_inputs("inputs", data),
        *_inputs("validation", validation),
    ]
    file, lines = split_words(words)
    resolved = resolve("study", file, lines)
    if dry_run:
        raise typer.Exit(_print_sizes(words, as_json=json))
    if minutes is not None:
        words += ["--minutes", str(minutes)]
    module = "train.study.jobs" if address else "train.study"
    words += ["--address", address] if address else []
    folder = Path(resolved.config["study"]["dir"])
    if address and not folder.is_absolute():
        raise ConfigError(
            f"study.dir={folder} is relative, but the jobs run elsewhere; name a folder that all "
            f"nodes share, such as study.dir={folder.absolute()}"
        )
    code = _run([module, *words], folder)
    if code in (0, _PAUSED):
        _print_end(folder, done=code == 0, as_json=json)
    raise typer.Exit(code)


def _inputs(key: str, paths: Sequence[Path] | None) -> list[str]:
    """Paths of the command line as an override: they start here, not at the config's folder."""
    if not paths:
        return []
    plain = [os.path.abspath(path) for path in paths]
    return [f"data.{key}={jsons.dumps(plain, ensure_ascii=False)}"]


def _print_sizes(words: Sequence[str], *, as_json: bool) -> int:
    command = [sys.executable, "-m", "train.study", *words, "--dry-run"]
    environment = env.child_environment(starts_cluster=False)
    return subprocess.run(
        [*command, *(["--json"] if as_json else [])], env=environment, check=False
    ).returncode


def _run(words: Sequence[str], folder: Path) -> int:
    console = err()
    child = Child(words, on_line=console.print)
    with child.attached():
        _follow(folder / "progress.json", child.has_ended)
        return child.wait()


def _follow(path: Path, is_over: Callable[[], bool]) -> None:
    """Draw the steps of all runs as one bar until `is_over`."""
    before = _read(path)
    with bar("study") as progress:
        while not is_over():
            if (now := _read(path)) not in (None, before):
                done = now["steps"] / max(1, now["max_steps"])
                running = ", ".join(now["running"])
                progress.update(progress.task_ids[0], completed=done, numbers=running)
            time.sleep(_POLL_S)


def _read(path: Path) -> Any:
    try:
        return jsons.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _print_end(folder: Path, *, done: bool, as_json: bool) -> None:
    results = _read(folder / "results.json") or {}
    summary = folder / "summary.md"
    lines = summary.read_text(encoding="utf-8") if summary.is_file() else ""
    missing = results.get("missing", [])
    ending = "" if done else "\npaused: the same command goes on"
    facts = {"study_dir": str(folder), "done": done, **results}
    print_facts(
        facts,
        f"{lines}\n{folder / 'page.md'}: {results.get('finished', 0)} runs, {len(missing)} to go"
        f"{ending}",
        as_json=as_json,
    )
