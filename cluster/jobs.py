"""A command as a Ray job: `python -m train ...` or `python -m serve ...` on a running cluster.

What is sent: this checkout as the job's working folder, the command, and in its metadata what it
is and where its run folder lies. What is checked first: the config, the paths and URIs (a job runs
on other machines, in a temporary folder), and that the cluster is large enough.
"""

import json
import secrets
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.job_submission import JobDetails

from gptmoe import remote
from gptmoe.config import Uri
from gptmoe.errors import ClusterError, ConfigError, DataError

from . import env
from .dashboard import Dashboard
from .patience import within
from .resolve import Resolved, resolve
from .resources import gpus_per_worker, needed

EXCLUDED = (".git", ".venv", "tests", "runs", "build")
"""What a job does not need of a checkout, beside what Ray leaves out itself: .gitignore's."""

RUN_DIR = "gptmoe_run_dir"
KIND = "gptmoe_kind"
"""Keys of a job's metadata."""

_LOOK_S = 60.0

_PATHS = {
    "pretrain": ("data.path", "data.tokenizer", "data.validation_path", "model.checkpoint"),
    "finetune": ("data.path", "data.tokenizer", "data.validation_path", "model.checkpoint"),
    "serve": ("checkpoint",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is about to be submitted."""

    job_id: str
    kind: str
    run_dir: str  # empty for serve
    entrypoint: str
    workers: int


def make_job(kind: str, config: Path | None, overrides: Sequence[str]) -> Job:
    """Check a command and describe it as a job.

    Raises ConfigError for a config that does not load, a path that other machines cannot know, or a
    URI where nothing is found.
    """
    resolved = resolve(kind, config, overrides)
    run_dir = ""
    paths = list(_path_overrides(resolved))
    if kind != "serve":
        run_dir = _shared_folder(resolved.config["run"]["dir"])
        paths.append(f"run.dir={json.dumps(run_dir, ensure_ascii=False)}")
    words = [*([_job_path("config file", str(config))] if config else []), *overrides, *paths]
    name = Path(run_dir).name or resolved.config.get("name", "")
    module = ["serve"] if kind == "serve" else ["train", kind]
    return Job(
        job_id=f"{kind}-{name}-{secrets.token_hex(3)}",
        kind=kind,
        run_dir=run_dir,
        entrypoint=entrypoint([*module, *words]),
        workers=resolved.workers,
    )


def submit(dashboard: Dashboard, job: Job, *, wait_s: float = 60.0) -> str:
    """Start the job; returns its id. Raises ClusterError if the cluster is or stays too small."""
    if not (env.ROOT / "pyproject.toml").is_file():
        raise ClusterError(
            f"a job takes the code of a checkout along, and {env.ROOT} is none; "
            "clone the repository and submit from there"
        )
    dashboard.require(room(job, dashboard.resources()), wait_s)
    metadata = {KIND: job.kind, RUN_DIR: job.run_dir}
    send(dashboard, job.entrypoint, job_id=job.job_id, metadata=metadata)
    return job.job_id


def send(dashboard: Dashboard, entrypoint: str, **options: Any) -> None:
    """Submit an entry point with the code of this checkout; `options` as in Dashboard.submit."""
    working_dir = {"working_dir": str(env.ROOT), "excludes": list(EXCLUDED)}
    dashboard.submit(entrypoint, runtime_env=working_dir, **options)


def room(job: Job, cluster: Mapping[str, float]) -> dict[str, float]:
    """What a job asks of a cluster at the least: as training does, GPUs if there are any."""
    return needed(job.workers, 0 if job.kind == "serve" else gpus_per_worker(cluster))


def exit_code(job: JobDetails) -> int:
    """What a job that has ended would have returned to a shell."""
    if job.status == "SUCCEEDED":
        return 0
    return job.driver_exit_code or (130 if job.status == "STOPPED" else 1)


def _path_overrides(resolved: Resolved) -> Iterator[str]:
    """Each input path as an override that means the same inside the job."""
    for key in _PATHS[resolved.kind]:
        value: Any = resolved.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value:
            yield f"{key}={json.dumps(_job_path(key, value), ensure_ascii=False)}"


def _job_path(key: str, value: str) -> str:
    """Where a job finds an input: the checkout's travel with it, the rest is shared or a URI."""
    if "://" in value:
        return check_uri(key, Uri(value))
    path = Path(value)
    if not path.exists():
        raise ConfigError(f"{key}={value} does not exist on this machine; check the path")
    absolute = path.resolve()
    if absolute.is_relative_to(env.ROOT):
        inside = absolute.relative_to(env.ROOT)
        if not set(inside.parts[:1]) & set(EXCLUDED):
            return str(inside)
    if not path.is_absolute():
        raise ConfigError(
            f"{key}={value} is relative, but the job runs elsewhere; name a path that all nodes "
            f"share, such as {absolute}"
        )
    return value


def check_uri(
    key: str, uri: Uri, look: Callable[[Uri], None] = remote.check, timeout_s: float = _LOOK_S
) -> str:
    """The URI, if `look` finds something there in time from this machine; else ConfigError."""
    try:
        within(timeout_s, lambda: look(uri))
    except DataError as error:
        raise ConfigError(f"{key}: {error}") from None
    except TimeoutError:
        raise ConfigError(
            f"{key}: {uri} does not answer within {timeout_s:g} s; check the address, and this "
            "machine's network and credentials"
        ) from None
    return uri


def _shared_folder(value: str) -> str:
    path = Path(value)
    if not path.is_absolute():
        raise ConfigError(
            f"run.dir={value} is relative, and a job's own folder is temporary; name a folder "
            f"that all nodes share, such as run.dir={path.absolute()}"
        )
    if not path.parent.is_dir():
        raise ConfigError(
            f"run.dir={value}: {path.parent} does not exist on this machine; name a folder that "
            "all nodes share"
        )
    return value


def entrypoint(words: Sequence[str]) -> str:
    """The command, by this Python if the cluster's head has it too, else by its own."""
    command = shlex.join(["-m", *words])
    python = shlex.quote(sys.executable)
    return f'python={python}; [ -x "$python" ] || python=python; exec "$python" {command}'
