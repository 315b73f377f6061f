"""What becomes of a failure: another try, our own error, or what happened in one sentence."""

import errno
import logging

import pytest
import ray.exceptions
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from gptmoe.errors import CheckpointError, ClusterError, GptMoeError
from train.recovery import RecoveryPolicy, RestartError, first_cause, what_failed

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE
SAVING = CheckpointError("checkpoint a was not saved: No space left on device")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def died() -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError(
        "A worker health check failed.\nWorker info: ...", ray.exceptions.ActorDiedError()
    )


@pytest.mark.parametrize(
    "failures",
    [{0: SAVING}, {0: RuntimeError("connection reset"), 1: caused(RuntimeError("x"), SAVING)}],
    ids=["itself", "as a cause"],
)
def test_an_error_of_ours_comes_through(failures: dict[int, Exception]) -> None:
    assert first_cause(WorkerGroupError("...", failures)) is SAVING


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (
            WorkerGroupError("...", {0: RuntimeError("connection reset by peer"), 1: died()}),
            "the process of worker 1 was killed or its node was lost",
        ),
        (
            WorkerGroupError("...", {0: OSError(errno.ENOSPC, "No space left on device")}),
            "worker 0: No space left on device",
        ),
    ],
    ids=["killed", "disk full"],
)
def test_what_the_world_does_is_one_sentence(
    error: Exception, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert_sentence(first_cause(error), what)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (
            WorkerGroupError("Traceback: line 7", {2: KeyError("a\nb")}),
            "worker 2 failed: KeyError: 'a\\nb'",
        ),
        (ControllerError(ValueError("a port is taken\nmore")), "ValueError: a port is taken"),
        (ray.exceptions.RayError("the cluster is gone\nmore"), "RayError: the cluster is gone"),
    ],
    ids=["worker", "controller", "ray"],
)
def test_a_bug_is_a_sentence_and_its_details_are_logged(
    error: Exception, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        assert_sentence(first_cause(error), what)
    assert caplog.messages == [str(error)]


def assert_sentence(error: GptMoeError, what: str) -> None:
    assert isinstance(error, ClusterError)
    assert str(error) == (
        f"training stopped, {what}; start the same command again to go on from the last checkpoint"
    )


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the coordinator would be told."""
    reasons: list[str] = []
    monkeypatch.setattr("train.recovery.report_failure", lambda run, reason: reasons.append(reason))
    return reasons


def policy() -> RecoveryPolicy:
    return RecoveryPolicy(FailureConfig(max_failures=2), "tiny-1f2e3d")


def test_lost_workers_are_tried_again_so_often_and_no_more(told: list[str]) -> None:
    lost, decide = WorkerGroupError("...", {1: died()}), policy().make_decision
    assert [decide(lost) for _ in range(3)] == [RETRY, RETRY, RAISE]
    assert told == ["the process of worker 1 was killed or its node was lost"] * 2


def test_errors_of_ours_are_not_tried_again(told: list[str]) -> None:
    assert policy().make_decision(WorkerGroupError("...", {0: SAVING, 1: died()})) == RAISE
    assert told == []


def test_a_notice_is_not_counted_as_a_failure(told: list[str]) -> None:
    decide = policy().make_decision
    notice = WorkerGroupError("...", {0: RestartError("a node is about to go"), 1: died()})
    assert [decide(notice) for _ in range(5)] == [RETRY] * 5
    assert set(told) == {"a node is about to go"}


def test_a_frozen_process_is_named() -> None:
    frozen = WorkerHealthCheckTimeoutError("A worker health check has been hanging")
    sentence = what_failed({1: frozen}, WorkerGroupError("...", {1: frozen}))
    assert sentence == "the process of worker 1 does not answer: it hangs, or its node is lost"
