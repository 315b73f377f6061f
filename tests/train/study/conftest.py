"""A study of seconds on the bundled poems, and a launcher that needs no processes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptmoe.config import load
from gptmoe.errors import GptMoeError
from train.state import StateFile
from train.study.config import StudyConfig
from train.study.launch import Handle
from train.study.order import PAUSED, Order
from train.study.study import Study
from train.study.training import Paused, measure, train_arm

ROOT = Path(__file__).parents[3]
TINY = ROOT / "configs" / "study" / "tiny.toml"

Configure = Callable[..., StudyConfig]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """The tiny study in tmp_path/study, one seed, no measurements; later overrides win."""

    def make(*overrides: str) -> StudyConfig:
        few = (f"study.dir={tmp_path / 'study'}", "study.seeds=[0]", "study.speed_steps=0")
        return load(StudyConfig, TINY, [*few, *overrides])

    return make


class Ended:
    """Something that ran and ended with a code."""

    def __init__(self, code: int, words: str = "") -> None:
        self._code, self._words = code, words

    def poll(self) -> int:
        return self._code

    def stop(self) -> None:
        """It has ended."""

    def leave(self) -> None:
        """It has ended."""

    def last_words(self) -> str:
        return self._words


@dataclasses.dataclass
class InProcess:
    """Carries orders out at once, in this process, and notes which."""

    stop_after_steps: int = 10**9
    started: list[str] = dataclasses.field(default_factory=list)

    def start(self, order: Order) -> Handle:
        self.started.append(order.folder.name)
        asked = iter(range(1, 10**9))
        try:
            if order.kind == "speed":
                measure(order, torch.device("cpu"))
            else:
                train_arm(order, torch.device("cpu"), lambda: next(asked) >= self.stop_after_steps)
        except Paused:
            return Ended(PAUSED)
        except GptMoeError as error:
            return Ended(2, f"failed: {error}")
        return Ended(0)


def run_study(config: StudyConfig, launcher: InProcess) -> bool:
    """Prepare and run a study without a figure; whether it is done."""
    config.study.dir.mkdir(parents=True, exist_ok=True)
    study = Study.prepare(config, StateFile(config.study.dir), "gptmoe study routers tiny.toml")
    return dataclasses.replace(study, draw=lambda folder: None).run(launcher, until_s=0.0)
