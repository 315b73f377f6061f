"""A study's run as a Ray job: asked, stopped, and what a silent dashboard means."""

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.dashboard import Dashboard
from gptmoe.errors import ClusterError
from tests.train.test_watchdog import Clock
from train.study.jobs import Job


class Answers:
    """A dashboard that gives these answers in order, then the last one for ever."""

    def __init__(self, *answers: str) -> None:
        self._answers = list(answers)
        self.asked_to_stop = 0

    def job(self, job_id: str) -> Any:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if answer == "silent":
            raise ClusterError("the Ray cluster does not answer within 20 s")
        return SimpleNamespace(status=answer, driver_exit_code=3, message="")

    def stop(self, job_id: str, wait_s: float = 60.0) -> str:
        self.asked_to_stop += 1
        raise ClusterError(f"job {job_id} has not stopped after {wait_s:g} s")

    def logs(self, job_id: str) -> str:
        raise ClusterError("the Ray cluster does not answer within 20 s")


def job(answers: Answers, clock: Clock | None = None) -> Job:
    return Job(cast(Dashboard, answers), "study-a", clock or Clock())


def test_a_job_runs_until_it_has_ended_with_its_exit_code() -> None:
    asked = job(Answers("PENDING", "RUNNING", "FAILED"))
    assert [asked.poll(), asked.poll(), asked.poll()] == [None, None, 3]


def test_a_dashboard_that_is_silent_for_a_while_ends_no_study(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    asked = job(Answers("RUNNING", "silent", "silent", "RUNNING", "silent"), clock)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert asked.poll() is None
            clock.now_s += 60.0
    assert caplog.text.count("nothing is heard of job study-a") == 2  # once for each silence
    clock.now_s += 120.0
    with pytest.raises(ClusterError, match="does not answer within 20 s"):
        asked.poll()


def test_a_job_is_asked_to_stop_without_waiting_for_it() -> None:
    answers = Answers("RUNNING")
    asked = job(answers)
    asked.stop()
    assert answers.asked_to_stop == 1
    with pytest.raises(ClusterError, match="has not stopped after 60 s"):
        asked.leave()


def test_logs_that_cannot_be_read_are_no_last_words() -> None:
    assert job(Answers("FAILED")).last_words() == ""
