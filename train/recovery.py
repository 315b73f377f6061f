"""What happens when a worker fails: tried again, or told to the person, and in which words."""

import logging
from collections.abc import Mapping

import ray.exceptions
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from cluster.coordinator_actor import report_failure
from gptmoe.errors import ClusterError, GptMoeError

from .state import GO_ON

log = logging.getLogger(__name__)

_DEAD = (WorkerHealthCheckFailedError, ray.exceptions.ActorDiedError)


class RestartError(RuntimeError):
    """All is saved, and another start of the workers goes on; the message says why."""


class RecoveryPolicy(DefaultFailurePolicy):
    """Starts all workers again, from the newest checkpoint, unless that could not help.

    An error of ours is about the input, the config or a disk: the next try would end alike. Lost
    processes and nodes, hangs and whatever else is unexpected are tried again.
    """

    def __init__(self, failure_config: FailureConfig, run_name: str) -> None:
        super().__init__(failure_config)
        self._run_name = run_name

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Raise or retry; says what failed first."""
        failures: Mapping[int, BaseException] = getattr(
            training_failed_error, "worker_failures", {}
        )
        if any(own_error(failure) for failure in failures.values()):
            return FailureDecision.RAISE
        if any(isinstance(failure, RestartError) for failure in failures.values()):
            decision = FailureDecision.RETRY  # foreseen, and not counted
        else:
            decision = super().make_decision(training_failed_error)
        if decision is FailureDecision.RETRY:
            reason = what_failed(failures, training_failed_error)
            log.warning("%s; the workers start again from the newest checkpoint", reason)
            report_failure(self._run_name, reason)
        return decision


def first_cause(error: BaseException) -> GptMoeError:
    """Our own error if a worker raised one, else what happened in a sentence."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        if own := own_error(failure):
            return own
    if not any(
        isinstance(failure, (*_DEAD, WorkerHealthCheckTimeoutError, OSError))
        for failure in failures.values()
    ):
        log.error("%s", error)  # a bug, ours or Ray's: with its traceback
    return ClusterError(f"training stopped, {what_failed(failures, error)}; {GO_ON}")


def what_failed(failures: Mapping[int, BaseException], error: BaseException) -> str:
    """The first cause, in words: what other workers raised is what they saw of it."""
    for rank, failure in failures.items():
        if isinstance(failure, RestartError):
            return str(failure)
        if isinstance(failure, _DEAD):
            return f"the process of worker {rank} was killed or its node was lost"
        if isinstance(failure, WorkerHealthCheckTimeoutError):
            return f"the process of worker {rank} does not answer: it hangs, or its node is lost"
    for rank, failure in failures.items():
        if isinstance(failure, OSError) and failure.strerror:
            return f"worker {rank}: {failure.strerror}"
    if failures:
        rank, failure = next(iter(failures.items()))
        return f"worker {rank} failed: {_first_line(failure)}"
    return _first_line(getattr(error, "controller_failure", error))


def own_error(failure: BaseException | None) -> GptMoeError | None:
    """The first error of ours in a chain of causes."""
    while failure is not None and not isinstance(failure, GptMoeError):
        failure = failure.__cause__ or getattr(failure, "cause", None)
    return failure


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
