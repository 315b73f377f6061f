"""python -m train.study.jobs CONFIG --address http://HEAD:8265: a study whose runs are Ray jobs.

The study's folder must be one that all nodes share: this process reads there what the jobs write.
"""

import logging
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from cluster import env

env.prepare()  # before anything imports ray

from cluster import jobs  # noqa: E402
from cluster.dashboard import FINISHED, Dashboard  # noqa: E402
from cluster.resources import gpus_per_worker, needed  # noqa: E402
from gptmoe.errors import ClusterError  # noqa: E402

from .__main__ import Options, parse, run  # noqa: E402
from .launch import Handle, Launcher  # noqa: E402
from .order import Order  # noqa: E402

log = logging.getLogger(__name__)

_PATIENCE_S = 120.0


class Job:
    """A Ray job that carries out an order."""

    def __init__(
        self, dashboard: Dashboard, job_id: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._dashboard, self._job_id = dashboard, job_id
        self._clock = clock
        self._heard_at_s = clock()
        self._silent = False

    def poll(self) -> int | None:
        """A dashboard that does not answer for a while says nothing about the job: it runs."""
        try:
            job = self._dashboard.job(self._job_id)
        except ClusterError as error:
            if self._clock() - self._heard_at_s > _PATIENCE_S:
                raise
            if not self._silent:
                log.warning("nothing is heard of job %s: %s", self._job_id, error)
            self._silent = True
            return None
        self._heard_at_s, self._silent = self._clock(), False
        return jobs.exit_code(job) if job.status in FINISHED else None

    def stop(self) -> None:
        """Only asks: that it has not ended at once is no failure, and `leave` asks again."""
        with suppress(ClusterError):
            self._dashboard.stop(self._job_id, wait_s=0.0)

    def leave(self) -> None:
        self._dashboard.stop(self._job_id)

    def last_words(self) -> str:
        """None, if the cluster does not tell: the exit code says enough."""
        lines = []
        with suppress(ClusterError):
            lines = self._dashboard.logs(self._job_id).strip().splitlines()
        return lines[-1] if lines else ""


class Jobs:
    """Ray jobs: each asks for its threads as CPUs, and for a GPU where there are any."""

    def __init__(self, dashboard: Dashboard) -> None:
        self._dashboard = dashboard
        self._gpus = gpus_per_worker(dashboard.resources())

    def start(self, order: Order) -> Handle:
        words = ["train.study.work", str(order.write())]
        self._dashboard.require(needed(order.threads, self._gpus))
        job_id = f"study-{order.folder.name}-{secrets.token_hex(3)}"
        jobs.send(
            self._dashboard,
            jobs.entrypoint(words),
            job_id=job_id,
            metadata={jobs.KIND: "study", jobs.RUN_DIR: str(order.folder)},
            entrypoint_num_cpus=order.threads,
            entrypoint_num_gpus=self._gpus or None,
        )
        return Job(self._dashboard, job_id)


def _launcher(options: Options) -> Launcher:
    return Jobs(Dashboard(options.address))


def main(words: Sequence[str]) -> int:
    """As train/study/__main__.py, on a cluster."""
    return run(parse(words), _launcher)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
