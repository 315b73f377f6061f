"""Whole runs on several layouts: one process's numbers, and checkpoints that change hands."""

from pathlib import Path

import pytest

from gptmoe.config import load
from gptmoe.metrics import read
from tests.ranks.pool import RankPool
from tests.train.alone import run_alone, run_rank
from tests.train.conftest import SMALL, TINY
from train.config import TrainConfig
from train.plan import RunPlan, make_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


def plan(folder: Path, *overrides: str) -> RunPlan:
    words = [*SMALL, f"run.dir={folder}", "data.workers=0", "train.validate_every_steps=2"]
    return make_plan("pretrain", load(TrainConfig, TINY, [*words, *overrides]))


def do(pool: RankPool, plan: RunPlan) -> None:
    world = plan.config.parallel.layout().world
    if world == 1:
        run_alone(plan)
    else:
        pool.run(world, run_rank, plan)


def numbers(folder: Path, name: str) -> list[float]:
    return [record[name] for record in read(folder / "metrics.jsonl") if name in record]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """Six steps in one process."""
    run_alone(plan(folder / "alone", "train.max_steps=6"))
    return folder / "alone"


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize(("dp", "ep"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_no_layout_changes_the_numbers(
    pool: RankPool, folder: Path, alone: Path, dp: int, ep: int, zero: int
) -> None:
    words = [f"parallel.dp={dp}", f"parallel.ep={ep}", f"parallel.zero={zero}", "train.max_steps=3"]
    run = folder / f"dp{dp}-ep{ep}-zero{zero}"
    do(pool, plan(run, *words))
    for name in ("loss", "grad_norm", "dropped_ratio", "router_entropy"):
        assert numbers(run, name) == pytest.approx(numbers(alone, name)[:3], rel=1e-5), name
    assert numbers(run, "expert_load") == numbers(alone, "expert_load")[:3]
    assert numbers(run, "val_loss")[0] == pytest.approx(numbers(alone, "val_loss")[0], rel=1e-5)


def test_a_run_may_go_on_with_another_layout(pool: RankPool, folder: Path, alone: Path) -> None:
    parts = (
        ("train.max_steps=2", "parallel.ep=2"),
        ("train.max_steps=3", "parallel.dp=4", "parallel.ep=4", "parallel.zero=1"),
        ("train.max_steps=4",),
        ("train.max_steps=6", "parallel.dp=4", "parallel.ep=2"),
    )
    for words in parts:
        do(pool, plan(folder / "changing", *words))
    assert numbers(folder / "changing", "loss") == pytest.approx(numbers(alone, "loss"), rel=1e-5)
