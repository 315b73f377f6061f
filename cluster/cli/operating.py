"""gptmoe submit, status, logs, stop: runs and jobs from afar."""

import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cluster import runs
from cluster.resolve import split_words
from gptmoe.errors import ClusterError

from . import lazy
from .output import Json, examples, print_facts
from .serving import Checkpoint, words_of

app = typer.Typer(rich_markup_mode=None)

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
    )
)
def status(
    run_dir: Annotated[Path | None, typer.Argument(help="The folder of a run.")] = None,
    address: Address = "",
    json: Json = False,
) -> None:
    """Show who owns what, and how far it is.

    Of one run by its folder, or of a whole cluster: resources, jobs, what it serves.
    """
    if run_dir:
        found = lazy.status().of_folder(run_dir)
        drawing = lazy.drawing().draw_run(found)
    else:
        found = lazy.status().of_cluster(lazy.dashboard().Dashboard(address))
        drawing = lazy.drawing().draw_cluster(found)
    print_facts(asdict(found), drawing, as_json=json)


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
    if not runs.is_alive(state):
        raise ClusterError(f"the run in {target} is not running on this machine")
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
