"""Who owns what, how far it is, and when it was last heard of.

`of_folder` reads what a run left in its folder, `of_cluster` asks a cluster for its jobs and
applications. Drawing is apart, in `drawing.py`; `asdict` of either is what `--json` prints.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptmoe.errors import ClusterError, GptMoeError

from . import jobs, runs, topology_file
from .dashboard import Dashboard, num_running
from .messages import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """One run."""

    run_dir: str
    state: str
    message: str
    step: int
    max_steps: int
    metrics: dict[str, Any]  # the newest value of each
    dashboard_url: str
    job_id: str
    alive: bool  # its process is on this machine, and ours to stop
    topology: Topology | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """One Ray job; `run` if its folder can be read from here."""

    job_id: str
    kind: str
    status: str
    message: str
    run: RunStatus | None
    problem: str = ""  # why its folder, though it is there, cannot be read


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplicationStatus:
    """One Ray Serve application."""

    name: str
    status: str
    message: str
    replicas: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """One cluster."""

    dashboard_url: str
    resources: dict[str, float]
    jobs: list[JobStatus]
    applications: list[ApplicationStatus]


def of_folder(folder: Path) -> RunStatus:
    """The run in `folder`. Raises ClusterError if there is none."""
    if not runs.is_run(folder):
        raise ClusterError(f"{folder} is not the folder of a run; name the run.dir of one")
    state = runs.read_state(folder)
    newest = runs.newest_metrics(folder)
    return RunStatus(
        run_dir=str(folder),
        state=state.state,
        message=state.message,
        step=newest.get("step", 0),
        max_steps=state.max_steps,
        metrics=newest,
        dashboard_url=state.dashboard_url,
        job_id=state.job_id,
        alive=runs.is_alive(folder, state),
        topology=topology_file.read(folder),
    )


def of_cluster(dashboard: Dashboard) -> ClusterStatus:
    """The jobs that were submitted to a cluster, and what it serves."""
    found = dashboard.applications()
    return ClusterStatus(
        dashboard_url=dashboard.url,
        resources=dashboard.resources(),
        jobs=[_job(job) for job in dashboard.jobs()],
        applications=[_application(name, details) for name, details in found.items()],
    )


def _job(job: Any) -> JobStatus:
    metadata = job.metadata or {}
    folder = Path(metadata.get(jobs.RUN_DIR) or "/nonexistent")
    run, problem = None, ""
    try:
        run = of_folder(folder) if runs.is_run(folder) else None
    except (GptMoeError, OSError) as error:  # one damaged file must not hide all other jobs
        problem = str(error)
    return JobStatus(
        job_id=job.submission_id,
        kind=metadata.get(jobs.KIND, ""),
        status=str(job.status),
        message=(job.message or "").strip().partition("\n")[0],
        run=run,
        problem=problem,
    )


def _application(name: str, details: Mapping[str, Any]) -> ApplicationStatus:
    return ApplicationStatus(
        name=name,
        status=details["status"],
        message=details["message"],
        replicas=num_running(details),
    )
