"""train.notices: when all workers are to start again, and why."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptmoe import config as configs
from gptmoe.errors import ConfigError
from tests.train.conftest import TINY
from train.config import RunConfig, TrainConfig
from train.notices import PROBES, Notices, product_seconds, slow_rank

CPU = torch.device("cpu")


class Ranks:
    """A mesh of three as rank 0 sees it: the others' rows are set by the test."""

    rank = 0
    layout = SimpleNamespace(world=3)

    def __init__(self) -> None:
        self.told = [0.0, 0.0]
        self.seconds = [1.0, 1.0]
        self.compares = False

    def gather(self, row: Sequence[float]) -> Tensor:
        """A comparison follows a question in which this rank said that it is due."""
        others = self.seconds if self.compares else self.told
        self.compares = not self.compares and row[1] > 0
        return torch.tensor([list(row), *([number, 0.0] for number in others)])


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def ranks() -> Any:
    return Ranks()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(ranks: Any, clock: Clock, folder: Path, **run: Any) -> Notices:
    config = RunConfig(dir=folder, **run)
    return Notices(ranks, CPU, config, probe=lambda device: 1.0, clock=clock)


def ask(notices: Notices, clock: Clock, times: int) -> list[str]:
    """At each of so many probes."""
    answers = []
    for _ in range(times):
        clock.now_s += 120 / PROBES
        answers.append(notices())
    return answers


def test_what_one_rank_was_told_is_told_to_all(ranks: Any, clock: Clock, tmp_path: Path) -> None:
    notices = make(ranks, clock, tmp_path)
    assert notices() == ""
    ranks.told = [0.0, 1.0]
    assert notices() == "a node is about to go"


def test_a_worker_that_stays_slow_is_named_once(ranks: Any, clock: Clock, tmp_path: Path) -> None:
    notices = make(ranks, clock, tmp_path)
    ranks.seconds = [1.1, 4.0]
    answers = ask(notices, clock, PROBES + 1)
    assert answers[:-1] == [""] * PROBES
    assert answers[-1] == (
        "worker 2 is slow: for 120 s its products have taken 3.8 times as long as the others'"
    )
    assert ask(make(ranks, clock, tmp_path), clock, 2 * PROBES) == [""] * 2 * PROBES


def test_a_moment_of_slowness_is_forgiven(ranks: Any, clock: Clock, tmp_path: Path) -> None:
    notices = make(ranks, clock, tmp_path)
    ranks.seconds = [1.0, 9.0]
    ask(notices, clock, PROBES)
    ranks.seconds = [9.0, 1.0]  # another one
    assert ask(notices, clock, PROBES)[-1] == ""
    ranks.seconds = [1.0, 1.0]
    assert ask(notices, clock, PROBES)[-1] == ""


def test_where_steps_are_long_three_probes_do(ranks: Any, clock: Clock, tmp_path: Path) -> None:
    notices = make(ranks, clock, tmp_path)
    ranks.seconds = [1.0, 9.0]
    answers = []
    for _ in range(3):
        clock.now_s += 500
        answers.append(bool(notices()))
    assert answers == [False, False, True]


def test_it_can_be_switched_off(ranks: Any, clock: Clock, tmp_path: Path) -> None:
    notices = make(ranks, clock, tmp_path, slow_factor=0.0)
    ranks.seconds = [1.0, 9.0]
    assert ask(notices, clock, 2 * PROBES) == [""] * 2 * PROBES


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        ([1.0, 3.0], (1, 3.0)),
        ([1.0, 2.9], None),
        ([2.0, 8.0, 1.0, 3.0], (1, 4.0)),
        ([4.0, 4.0, 1.0], None),
    ],
)
def test_a_slow_rank_is_measured_by_the_others(
    seconds: list[float], found: tuple[int, float] | None
) -> None:
    assert slow_rank(seconds, 3.0) == found


def test_a_probe_takes_time() -> None:
    assert 0 < product_seconds(CPU) < 1


def test_a_factor_that_nobody_could_meet_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run.slow_factor=1.0 must be 0 or above 1"):
        configs.load(TrainConfig, TINY, ["run.dir=x", "run.slow_factor=1"])
