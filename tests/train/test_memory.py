"""train.memory: a run that cannot fit is refused with the item and what would fit."""

import re

import pytest
import torch

from gptmoe import config as configs
from gptmoe.errors import ConfigError
from gptmoe.model.counts import parameters
from gptmoe.model.presets import preset
from gptmoe.model.spec import ModelSpec
from tests.train.conftest import TINY
from train.config import TrainConfig
from train.memory import check_fits, free_bytes, predicted

GIGA = 10**9


def large(*words: str) -> tuple[TrainConfig, ModelSpec]:
    name = "0.35B+MoE-64"
    given = [f"model.preset={name}", "run.dir=x", "train.batch_tokens=49152", *words]
    return configs.load(TrainConfig, TINY, given), preset(name).spec


def test_state_is_sixteen_bytes_a_parameter_and_less_when_experts_are_spread() -> None:
    config, spec = large()
    assert predicted(config, spec).state == pytest.approx(16 * parameters(spec).total, rel=0.01)
    spread, _ = large("parallel.ep=8")
    assert predicted(spread, spec).state < predicted(config, spec).state / 5


def test_what_fits_is_let_through() -> None:
    config, spec = large()
    check_fits(config, spec, 400 * GIGA)
    check_fits(config, spec, None)


@pytest.mark.parametrize(
    ("words", "gigabytes", "advice"),
    [
        ([], 80, "it would fit with parallel.ep=2"),
        (["parallel.ep=8"], 15, "it would fit with parallel.ep=16"),
        ([], 1, "use more devices (gptmoe plan says how many), larger ones, or a smaller model"),
    ],
)
def test_what_does_not_fit_is_refused(words: list[str], gigabytes: int, advice: str) -> None:
    config, spec = large(*words)
    with pytest.raises(ConfigError) as caught:
        check_fits(config, spec, gigabytes * GIGA)
    message = str(caught.value)
    assert re.match(
        rf"not enough memory: a rank needs [\d.]+ GB and has {gigabytes}.0; the largest item is "
        r"moments with [\d.]+ GB; ",
        message,
    )
    assert message.endswith(advice), message


def test_ranks_of_a_machine_share_its_memory() -> None:
    whole, half = (free_bytes(torch.device("cpu"), ranks) for ranks in (1, 2))
    assert whole is not None
    assert half == pytest.approx(whole / 2, rel=0.2)


def test_ranks_share_what_a_container_leaves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.memory.available_bytes", lambda: 6 * GIGA)
    assert free_bytes(torch.device("cpu"), 2) == 3 * GIGA
    monkeypatch.setattr("train.memory.available_bytes", lambda: None)
    assert free_bytes(torch.device("cpu"), 2) is None
