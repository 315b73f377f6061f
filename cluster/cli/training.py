"""gptmoe pretrain, finetune: python -m train as an attached child, or as a Ray job."""

import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster import follow, runs
from cluster.child import Child
from cluster.resolve import resolve, split_words
from gptmoe.errors import ClusterError

from . import lazy
from .output import Json, err, examples, print_facts

app = typer.Typer(rich_markup_mode=None)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file, see configs/train/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]", help="As parallel.ep=2 run.dir=DIR.")
]
Address = Annotated[
    str,
    typer.Option(
        help="Run as a job on this Ray cluster, as http://HEAD:8265; else on this machine."
    ),
]


@app.command(
    epilog=examples(
        "gptmoe pretrain configs/train/tiny.toml",
        "gptmoe pretrain configs/train/tiny.toml parallel.ep=2 run.dir=runs/ep2",
        "gptmoe pretrain my.toml run.dir=/shared/runs/a --address http://head:8265",
    )
)
def pretrain(
    config: Config, overrides: Overrides = None, address: Address = "", json: Json = False
) -> None:
    """Train a model on a corpus.

    Started again, an interrupted run goes on from its last checkpoint.
    """
    _train("pretrain", [config, *(overrides or [])], address, json)


@app.command(
    epilog=examples(
        "gptmoe finetune configs/train/finetune.toml model.checkpoint=runs/tiny data.path=poems.tsv"
    )
)
def finetune(
    config: Config, overrides: Overrides = None, address: Address = "", json: Json = False
) -> None:
    """Train a checkpoint further on examples.

    One a row: src_txt, or src_txt and tgt_txt (then only the target is learned).
    """
    _train("finetune", [config, *(overrides or [])], address, json)


def _train(kind: str, words: list[str], address: str, as_json: bool) -> None:
    file, overrides = split_words(words)
    if address:
        job = lazy.jobs().make_job(kind, file, overrides)
        code = run_job(lazy.dashboard().Dashboard(address), job)
        folder = Path(job.run_dir)
    else:
        resolved = resolve(kind, file, overrides)
        folder = Path(resolved.config["run"]["dir"])
        code = _run_child(["train", kind, str(file), *overrides], folder)
    if code == 0:
        newest = runs.newest_metrics(folder)
        facts = {"run_dir": str(folder), **newest}
        lines = f"{folder}: step {newest.get('step', 0)}  {follow.describe(newest)}"
        print_facts(facts, lines, as_json=as_json)
    raise typer.Exit(code)


def _run_child(words: list[str], folder: Path) -> int:
    console = err()
    child = Child(words, on_line=console.print)
    with child.attached():
        follow.follow(folder, console, child.has_ended)
        return child.wait()


def run_job(dashboard: Any, job: Any) -> int:
    """Submit a job, draw it until it ends, and return its exit code. Ctrl-C leaves it running, and
    so does a cluster that is lost from sight, which is a ClusterError.
    """
    console = err()
    job_id = lazy.jobs().submit(dashboard, job)
    console.print(f"job {job_id} on {dashboard.url}")

    lost: list[ClusterError] = []

    def print_logs() -> None:
        try:
            for piece in dashboard.follow(job_id):
                console.print(piece, end="")
        except ClusterError as error:
            lost.append(error)

    logs = threading.Thread(target=print_logs, daemon=True)
    try:
        logs.start()
        if job.run_dir:
            follow.follow(Path(job.run_dir), console, lambda: not logs.is_alive())
        logs.join()
        if lost:
            raise lost[0]
    except (KeyboardInterrupt, ClusterError):
        stop = f"gptmoe stop {job_id} --address {dashboard.url}"
        console.print(f"job {job_id} goes on; to stop it: {stop}")
        raise
    return lazy.jobs().exit_code(dashboard.job(job_id))
