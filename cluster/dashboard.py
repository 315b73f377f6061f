"""A Ray cluster through its dashboard: jobs, nodes, Ray Serve; from any machine that reaches it.

Ray's own client waits without end and speaks in stack traces. Here every call ends within a
timeout, and what can go wrong is a ClusterError that says what to do.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from gptmoe.errors import ClusterError

from . import env
from .patience import within
from .resources import missing

T = TypeVar("T")

log = logging.getLogger(__name__)

FINISHED = ("SUCCEEDED", "FAILED", "STOPPED")
_NOT_FOUND = re.compile(r"(Request failed with status code|Version check returned) 404\b")
"""How Ray's client says it. What a server says of another error may hold any number."""
_PROBE_S = 5.0
_POLL_S = 0.5
_AWAY_S = 60.0
"""A cluster whose job is followed may be away for so long."""


class Dashboard:
    """One cluster. `url` is its dashboard."""

    def __init__(self, address: str, timeout_s: float = 20.0) -> None:
        """Connect; `address` is http://HOST:PORT or HOST:PORT; empty: RAY_ADDRESS or this machine.

        Raises ClusterError if no cluster answers within `timeout_s`, or it wants a token.
        """
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.ERROR)  # it tells of each upload and each closed socket
        self._timeout_s = timeout_s
        self._where = f"at {address}" if address else "on this machine"
        if address:
            env.point_ray_at(_with_scheme(address))
        try:
            self._client: JobSubmissionClient = self._ask(JobSubmissionClient)
        except _NotFound:
            raise self._unreachable("something else answers") from None
        self.url = self._client.get_address()
        env.point_ray_at(self.url)

    def submit(self, entrypoint: str, *, job_id: str, **options: Any) -> None:
        """Start a job; `options` are those of Ray's submit_job. Uploading code may take a while."""
        self._ask(
            lambda: self._client.submit_job(entrypoint=entrypoint, submission_id=job_id, **options),
            timeout_s=10 * self._timeout_s,
        )

    def jobs(self) -> list[JobDetails]:
        """All submitted jobs, the newest first."""
        found = [job for job in self._ask(self._client.list_jobs) if job.submission_id]
        return sorted(found, key=lambda job: job.start_time or 0, reverse=True)

    def job(self, job_id: str) -> JobDetails:
        """One job. Raises ClusterError if the cluster does not know it."""
        try:
            return self._ask(lambda: self._client.get_job_info(job_id))
        except _NotFound:
            known = ", ".join(str(job.submission_id) for job in self.jobs()) or "none"
            raise ClusterError(f"{self.url} has no job {job_id}; its jobs: {known}") from None

    def stop(self, job_id: str, wait_s: float = 60.0) -> str:
        """Ask a job to stop and wait for its end; returns its last status."""
        if self.job(job_id).status not in FINISHED:
            self._ask(lambda: self._client.stop_job(job_id))
        deadline_s = time.monotonic() + wait_s
        while (status := self.job(job_id).status) not in FINISHED:
            if time.monotonic() >= deadline_s:
                raise ClusterError(
                    f"job {job_id} has not stopped after {wait_s:g} s; it may be saving, "
                    f"look at {self.url}"
                )
            time.sleep(_POLL_S)
        return str(status)

    def logs(self, job_id: str) -> str:
        """What the job has printed so far."""
        self.job(job_id)
        return self._ask(lambda: self._client.get_job_logs(job_id))

    def follow(self, job_id: str) -> Iterator[str]:
        """What the job prints, piece by piece, until it ends.

        Its log is opened again, and read on, when the connection ends before the job does. Raises
        ClusterError if the cluster does not know the job, or cannot be asked for a minute.
        """
        over = self.job(job_id).status in FINISHED
        told, warned = 0, False  # characters
        while True:
            known, problems = told, list[Exception]()
            for piece in self._log(job_id, problems):
                if fresh := piece[known:]:
                    yield fresh
                known, told = max(0, known - len(piece)), told + len(fresh)
            if problems and not warned:
                log.warning("the log of job %s breaks off: %s", job_id, problems[0])
                warned = True
            if over:
                return
            time.sleep(_POLL_S)
            over = self._is_over(job_id)  # if so, once more: the last lines may be missing

    def _is_over(self, job_id: str) -> bool:
        """Whether the job has ended, by a cluster that may be away for a while."""
        deadline_s = time.monotonic() + _AWAY_S
        while True:
            try:
                return self.job(job_id).status in FINISHED
            except ClusterError:
                if time.monotonic() >= deadline_s:
                    raise
            time.sleep(_POLL_S)

    def _log(self, job_id: str, problems: list[Exception]) -> Iterator[str]:
        """The log of a job from its beginning, until the connection ends; `problems` gets why, if
        that is not as it should."""
        loop = asyncio.new_event_loop()
        pieces = self._client.tail_job_logs(job_id)
        try:
            while True:
                yield loop.run_until_complete(anext(pieces))
        except StopAsyncIteration:
            return
        except Exception as error:  # noqa: BLE001  whatever it is, the job's status counts
            problems.append(error)
        finally:
            loop.run_until_complete(pieces.aclose())  # type: ignore[attr-defined]
            loop.close()

    def resources(self) -> dict[str, float]:
        """CPUs, GPUs and the rest of all living nodes together."""
        nodes = self._ask(
            lambda: list_nodes(address=self.url, timeout=int(self._timeout_s), detail=True)
        )
        total: dict[str, float] = {}
        for node in nodes:
            if node.state == "ALIVE":
                for name, amount in (node.resources_total or {}).items():
                    total[name] = total.get(name, 0.0) + amount
        return total

    def require(self, needed: Mapping[str, float], wait_s: float = 0.0) -> None:
        """Wait for a cluster with these resources; ClusterError says what is still missing then."""
        deadline_s = time.monotonic() + wait_s
        while lack := missing(needed, self.resources()):
            if time.monotonic() >= deadline_s:
                raise ClusterError(
                    f"the cluster at {self.url} lacks {lack} for this run (waited {wait_s:g} s); "
                    "add nodes, or use fewer workers"
                )
            time.sleep(_POLL_S)

    def applications(self) -> dict[str, Any]:
        """Ray Serve's applications by name, as Ray describes them; empty without Ray Serve."""
        found = self._request("GET", "/api/serve/applications/")
        return cast(dict[str, Any], found.get("applications", {}))

    def scale(self, application: str, replicas: int, wait_s: float) -> None:
        """Set the number of replicas of an application's only deployment; wait until they run."""
        applications = self.applications()
        if application not in applications:
            known = ", ".join(applications) or "none"
            raise ClusterError(f"{self.url} serves no {application}; it serves: {known}")
        (deployment,) = applications[application]["deployments"]
        path = f"/api/v1/applications/{application}/deployments/{deployment}/scale"
        self._request("POST", path, {"target_num_replicas": replicas})
        deadline_s = time.monotonic() + wait_s
        while (running := num_running(self.applications()[application])) != replicas:
            if time.monotonic() >= deadline_s:
                raise ClusterError(
                    f"{running} of {replicas} replicas of {application} run after {wait_s:g} s; "
                    f"the cluster has {self.resources().get('CPU', 0):g} CPU, see {self.url}"
                )
            time.sleep(_POLL_S)

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        def send() -> dict[str, Any]:
            answer = self._client._do_request(method, path, json_data=body)
            if answer.status_code == 404:
                return {}
            if answer.status_code == 412:
                raise ClusterError(
                    "this application scales itself; serve it with replicas.min = replicas.max "
                    "to scale it by hand"
                )
            answer.raise_for_status()
            return cast(dict[str, Any], answer.json())

        return self._ask(send)

    def _ask(self, question: Callable[[], T], timeout_s: float | None = None) -> T:
        """Call Ray's client in time, and put what goes wrong into a sentence."""
        timeout_s = timeout_s or self._timeout_s
        try:
            return within(timeout_s, question)
        except TimeoutError:
            raise ClusterError(
                f"the Ray cluster {self._where} does not answer within {timeout_s:g} s; look at "
                "its head node, or use another --address"
            ) from None
        except AuthenticationError:
            raise ClusterError(
                f"the Ray cluster {self._where} wants its token: copy ~/.ray/auth_token from "
                "its head node to this machine, or put the token into RAY_AUTH_TOKEN"
            ) from None
        except (ConnectionError, requests.RequestException, RayStateApiException) as error:
            raise self._unreachable(_first_sentence(error)) from None
        except (RuntimeError, ValueError) as error:
            if _NOT_FOUND.match(str(error)):
                raise _NotFound(str(error)) from None
            raise ClusterError(
                f"the Ray cluster {self._where}: {_first_sentence(error)}"
            ) from error

    def _unreachable(self, reason: str) -> ClusterError:
        return ClusterError(
            f"no Ray cluster answers {self._where} ({reason}); name the dashboard of one, such as "
            "--address http://HEAD:8265"
        )


class _NotFound(ClusterError):
    """The cluster does not know what was asked for."""


def num_running(application: Mapping[str, Any]) -> int:
    """Replicas that run, of one application as Ray describes it."""
    deployments = application["deployments"].values()
    replicas = [replica for deployment in deployments for replica in deployment["replicas"]]
    return sum(replica["state"] == "RUNNING" for replica in replicas)


def _with_scheme(address: str) -> str:
    """HOST:PORT is a dashboard if one answers there, else the address that Ray's drivers use."""
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdigit():
        return address
    try:
        requests.get(f"http://{host}:{port}/api/version", timeout=_PROBE_S)
    except requests.RequestException:
        return address
    return f"http://{address}"


def _first_sentence(error: BaseException) -> str:
    line = (str(error) or type(error).__name__).strip().splitlines()[0]
    return line.partition(". ")[0].rstrip(".")
