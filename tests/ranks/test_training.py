"""Whole runs on several layouts: one process's numbers, and checkpoints that change hands."""

from pathlib import Path

import pytest
import torch

import gptmoe
from gptmoe.checkpoint import open_checkpoint
from gptmoe.config import load
from gptmoe.metrics import read
from gptmoe.model.routers import ROUTERS
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


@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if kind != "switch"])
def test_what_a_router_learned_changes_hands(pool: RankPool, folder: Path, kind: str) -> None:
    """Saved, read and cut anew between layouts, and served at the end."""
    router = [f"router.kind={kind}", "router.bias_rate=0.05", "model.num_layers=4"]
    one, many = folder / f"{kind}-one", folder / f"{kind}-many"
    run_alone(plan(one, *router, "train.max_steps=6"))
    parts = (
        ("train.max_steps=2", "parallel.tp=2", "parallel.ep=2"),
        ("train.max_steps=3", "parallel.pp=2", "parallel.schedule=gpipe"),
        ("train.max_steps=4", "parallel.dp=4", "parallel.ep=2", "parallel.zero=1"),
        ("train.max_steps=6",),
    )
    for words in parts:
        do(pool, plan(many, *router, *words))
    assert numbers(many, "loss") == pytest.approx(numbers(one, "loss"), rel=1e-5)
    assert numbers(many, "val_loss")[-1] == pytest.approx(numbers(one, "val_loss")[-1], rel=1e-5)
    served, stored = gptmoe.load(many, packed=False), open_checkpoint(one)
    learned = dict(served.network.named_buffers())
    assert bool(learned) == (kind in ("loss_free", "expert_choice"))
    for name, values in learned.items():
        torch.testing.assert_close(values, stored.read(name), rtol=1e-4, atol=1e-5)
        assert values.any()
