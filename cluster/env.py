"""The environment of Ray, DeepSpeed and the maths libraries: the only place that reads or sets it.

Token authentication. `ray.init` on a new local cluster switches tokens on and makes
~/.ray/auth_token; `ray start --head` switches them on if that file is there. A client without
RAY_AUTH_MODE=token then gets "401" from the dashboard and 20 silent seconds from `ray.init`. A
cluster without tokens ignores the one that a client sends. So whoever has a token sends it, and
whoever starts a cluster asks for one. Ray reads the mode when it is imported: set later, it breaks.
"""

import contextlib
import json
import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout (or site-packages folder) that holds our packages."""

_ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # else the dashboard's Train tab stays empty
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",  # a frozen process; Ray's default is 600
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in the driver and in its workers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a notice about its next default
    "GRPC_VERBOSITY": "ERROR",
    # Ray Serve's proxies ask replicas over gRPC: half the work of an object of Ray's a message.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
}
_SERVING = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # handles too
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",  # no other thread wakes up for each message
}
_ANY_SIZE = {
    # The doors bound what comes in; what they let through reaches a replica. Ray's default: 4 MiB.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    # Ray Serve's own door, both ways: a message of its default, 2 GiB, would hold up all others for
    # seconds. The longest answer, with all its logprobs, is a few MiB.
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(32 * 2**20),
}
_HEAD = {
    # A node whose processes are gone refuses connections: counted after 2 s instead of Ray's 15.
    # One that is only slow has 10 s for each of these four answers, as before.
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "4",
}
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's name for what a job knows about itself
ATTACHED = "GPTMOE_ATTACHED"  # standard input is the parent's, and closes when that ends
_DEVICE_FILE = Path("/dev/nvidiactl")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the defaults for this process and its children; what the user has set stays.

    The first thing an entry point does: the token counts only if ray is not imported yet.
    """
    settings = _ALWAYS | _ANY_SIZE
    if not has_gpu():
        settings["DS_ACCELERATOR"] = "cpu"
    if _has_token(environment) and "ray" not in sys.modules:
        settings["RAY_AUTH_MODE"] = "token"
    for name, value in settings.items():
        environment.setdefault(name, value)


def child_environment(
    environment: Mapping[str, str] = os.environ, *, starts_cluster: bool
) -> dict[str, str]:
    """The environment of a child that runs `python -m train` or `python -m serve`."""
    result = {**environment, "PYTHONPATH": _with_root(environment), "PYTHONUNBUFFERED": "1"}
    if starts_cluster:
        for name, value in {"RAY_AUTH_MODE": "token", **_HEAD}.items():
            result.setdefault(name, value)
    return result


def take_attached(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether this process is an attached child. Its own children are not: they do not hear it."""
    return environment.pop(ATTACHED, "") == "1"


def uses_token(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the Ray cluster of this process wants a token of everybody, its dashboard too."""
    return environment.get("RAY_AUTH_MODE") == "token"


def worker_environment(
    threads: int, *, use_gpu: bool, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The `env_vars` of a runtime environment for actors that compute with `threads` threads."""
    result = dict(_ALWAYS) | dict.fromkeys(_THREADS, str(threads))
    if not use_gpu:  # Ray, as _ALWAYS has it, leaves those in sight that it did not give
        result |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    result["PYTHONPATH"] = _with_root(environment)
    return result


def replica_environment() -> dict[str, str]:
    """The `env_vars` of a runtime environment for replicas of Ray Serve, on any cluster."""
    return dict(_ANY_SIZE)


def edge_environment() -> dict[str, str]:
    """The same for actors that ask replicas from one event loop, by a DeploymentHandle."""
    return _SERVING | _ANY_SIZE


def inside_job(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the entry point of a Ray job: then its cluster is already there."""
    return _JOB in environment


def job_id(environment: Mapping[str, str] = os.environ) -> str:
    """The submission id of the Ray job whose entry point this process is; empty outside a job."""
    job = json.loads(environment.get(_JOB, "{}"))
    return str(job.get("metadata", {}).get("job_submission_id", ""))


def point_ray_at(dashboard_url: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Make Ray's clients use this dashboard: what the user has in RAY_ADDRESS would win over it."""
    environment["RAY_API_SERVER_ADDRESS"] = dashboard_url


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA driver, found without importing torch."""
    return _DEVICE_FILE.exists()


def protect_token(environment: Mapping[str, str] = os.environ) -> None:
    """Let nobody else read the file that Ray makes for its token: it is readable for all, and
    whoever has the token can run code on the cluster. One that the user has named stays."""
    if "RAY_AUTH_TOKEN_PATH" in environment:
        return
    file = _token_file(environment)
    with contextlib.suppress(OSError):  # there is none, or it is somebody else's to see to
        if file.stat().st_mode & 0o077:
            file.chmod(0o600)


def _has_token(environment: Mapping[str, str]) -> bool:
    return bool(environment.get("RAY_AUTH_TOKEN")) or _token_file(environment).is_file()


def _token_file(environment: Mapping[str, str]) -> Path:
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    return Path(named) if named else Path.home() / ".ray" / "auth_token"


def _with_root(environment: Mapping[str, str]) -> str:
    paths = [str(ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(path for path in paths if path))
