"""gptmoe submit, status, logs, stop: runs and jobs from afar."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cluster import runs
from cluster.resolve import split_words
from gptmoe.errors import ClusterError, ConfigError

from . import lazy
from .access import Ca, Cert, TokenFile, access_of
from .output import Json, examples, print_facts, print_live
from .serving import Checkpoint, Name, ServedAt, words_of

app = typer.Typer(rich_markup_mode=None)

_EVERY_S = 1.0

Address = Annotated[
    str,
    typer.Option(
        help="The dashboard of a Ray cluster, as http://HEAD:8265; else one started here."
    ),
]
Target = Annotated[
    str, typer.Argument(metavar="JOB|RUN_DIR", help="A job's id, or a run's folder.")
]


@app.command(
    epilog=examples(
        "gptmoe submit pretrain my.toml run.dir=/shared/runs/a --address http://head:8265",
        "gptmoe submit pretrain my.toml run.dir=/shared/runs/a data.path=s3://bucket/poems.tsv",
        "gptmoe submit serve --checkpoint /shared/runs/a --address http://head:8265",
    )
)
def submit(
    kind: Annotated[Literal["pretrain", "finetune", "serve"], typer.Argument(help="The command.")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG] [KEY=VALUE]", help="Its words.")
    ] = None,
    checkpoint: Checkpoint = "",
    address: Address = "",
    timeout_s: Annotated[
        float, typer.Option(help="Wait so long for a large enough cluster.")
    ] = 60.0,
    json: Json = False,
) -> None:
    """Start pretrain, finetune or serve as a Ray job.

    The code of this checkout goes along. Inputs must be paths that all nodes share, or URIs such as
    s3://bucket/poems.tsv, which are fetched once; run.dir is a folder that all nodes share.
    """
    file, overrides = split_words(words_of(words, checkpoint))
    job = lazy.jobs().make_job(kind, file, overrides)
    dashboard = lazy.dashboard().Dashboard(address)
    lazy.jobs().submit(dashboard, job, wait_s=timeout_s)
    facts = {"job_id": job.job_id, "dashboard_url": dashboard.url, "run_dir": job.run_dir}
    text = (
        f"job {job.job_id} on {dashboard.url}\n"
        f"  gptmoe logs {job.job_id} --follow --address {dashboard.url}\n"
        f"  gptmoe stop {job.job_id} --address {dashboard.url}"
    )
    print_facts(facts, text, as_json=json)


@app.command(
    epilog=examples(
        "gptmoe status runs/tiny",
        "gptmoe status --address http://head:8265 --json",
        "gptmoe status --target 127.0.0.1:9000 --watch",
    )
)
def status(
    run_dir: Annotated[Path | None, typer.Argument(help="The folder of a run.")] = None,
    address: Address = "",
    target: ServedAt = "",
    name: Name = "",
    ca: Ca = "",
    cert: Cert = None,
    token_file: TokenFile = None,
    watch: Annotated[bool, typer.Option("--watch", help="Draw it anew until Ctrl-C.")] = False,
    json: Json = False,
) -> None:
    """Show who owns what, and how far it is.

    Of one run by its folder; of a served model by --target: its shards and their load; or of a
    whole cluster: resources, jobs, what it serves.
    """
    if target:
        if run_dir or address:
            raise ConfigError("status takes one of RUN_DIR, --address and --target")
        with lazy.remote().operating(target, name, access_of(ca, cert, token_file)) as client:
            if watch:
                answers = lazy.remote().watch(client, _EVERY_S)
                print_live(map(_served, answers), as_json=json)
            else:
                print_facts(*_served(client.topology()), as_json=json)
        return
    look = _look_at(run_dir, address)
    if watch:
        print_live(_again(look), as_json=json)
    else:
        print_facts(*look(), as_json=json)


@app.command(epilog=examples("gptmoe logs pretrain-a-1f2e3d --follow --address http://head:8265"))
def logs(
    target: Target,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends.")
    ] = False,
    address: Address = "",
) -> None:
    """Print what a job has printed."""
    job_id, dashboard = find_job(target, address)
    if not job_id:
        raise ClusterError(f"{target} is no job: it printed to the terminal it was started in")
    if not follow:
        typer.echo(dashboard.logs(job_id), nl=False)
        return
    for piece in dashboard.follow(job_id):
        typer.echo(piece, nl=False)


@app.command(
    epilog=examples(
        "gptmoe stop runs/tiny", "gptmoe stop serve-gptmoe-1f2e3d --address http://head:8265"
    )
)
def stop(target: Target, address: Address = "", json: Json = False) -> None:
    """Stop a job or a run.

    A training run that is started again goes on from its last checkpoint.
    """
    job_id, dashboard = find_job(target, address)
    if job_id:
        facts = {"job_id": job_id, "status": dashboard.stop(job_id)}
        print_facts(facts, f"job {job_id}: {facts['status']}", as_json=json)
        return
    state = runs.read_state(Path(target))
    if state.state in runs.ENDED:
        raise ClusterError(f"the run in {target} has ended already: it is {state.state}")
    if not runs.is_alive(Path(target), state):
        raise ClusterError(
            f"the run in {target} is not running on this machine under your name; stop it where it "
            "was started"
        )
    os.kill(state.pid, signal.SIGINT)
    print_facts({"pid": state.pid, "status": "stopping"}, f"{target}: stopping", as_json=json)


def find_job(target: str, address: str) -> tuple[str, Any]:
    """The job behind a job id or a run's folder, and its cluster; no job: the run is attached."""
    if not runs.is_run(Path(target)):
        if Path(target).is_dir():
            raise ClusterError(f"{target} is not the folder of a run; name the run.dir of one")
        return target, lazy.dashboard().Dashboard(address)
    state = runs.read_state(Path(target))
    if not state.job_id:
        return "", None
    return state.job_id, lazy.dashboard().Dashboard(address or state.dashboard_url)


def _served(answer: Any) -> tuple[Any, Any]:
    return asdict(answer), lazy.drawing().draw_application(answer)


def _look_at(run_dir: Path | None, address: str) -> Callable[[], tuple[Any, Any]]:
    """Facts and drawing of a run's folder, or of a cluster, each time it is called."""
    status, drawing = lazy.status(), lazy.drawing()
    dashboard = None if run_dir else lazy.dashboard().Dashboard(address)

    def look() -> tuple[Any, Any]:
        found = status.of_folder(run_dir) if run_dir else status.of_cluster(dashboard)
        draw = drawing.draw_run if run_dir else drawing.draw_cluster
        return asdict(found), draw(found)

    return look


def _again(look: Callable[[], tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    while True:
        yield look()
        time.sleep(_EVERY_S)
