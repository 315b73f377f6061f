"""A small run on the bundled poems, as the training tests start from it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gptmoe import data
from gptmoe.config import load
from gptmoe.text import load_tokenizer
from tests.train.alone import run_alone
from train.config import TrainConfig
from train.plan import make_plan

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "train" / "tiny.toml"
POEMS = ROOT / "configs" / "corpus" / "poems.tsv"
TOKENIZER = ROOT / "configs" / "corpus" / "tokenizer.json"
SMALL = ("model.d_model=24", "model.num_heads=2", "data.seq_len=16", "train.batch_tokens=256")
"""Sixteen sequences a step, four a microbatch."""

Configure = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled poems, prepared for pretraining."""
    folder = tmp_path_factory.mktemp("prepared") / "poems"
    tokenizer = load_tokenizer(TOKENIZER)
    data.prepare([POEMS], tokenizer, folder, kind="pretrain", validation_fraction=0.05)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Poems as examples to finetune on: from the first half to the second."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    poems = POEMS.read_text(encoding="utf-8").splitlines()[:60]
    halves = ((poem[: len(poem) // 2], poem[len(poem) // 2 :]) for poem in poems)
    rows = [json.dumps({"src_txt": a, "tgt_txt": b}, ensure_ascii=False) for a, b in halves]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def two_steps(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps; not to be written to."""
    folder = tmp_path_factory.mktemp("two") / "run"
    overrides = [*SMALL, f"run.dir={folder}", f"data.path={prepared}", "train.max_steps=2"]
    run_alone(make_plan("pretrain", load(TrainConfig, TINY, overrides)))
    return folder


@pytest.fixture
def trained(two_steps: Path, tmp_path: Path) -> Path:
    """A copy of that run, where `configure` has its run.dir."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


@pytest.fixture
def configure(prepared: Path, tmp_path: Path) -> Configure:
    """The config of a small run in tmp_path/run; later overrides win."""

    def make(*overrides: str) -> TrainConfig:
        paths = [f"run.dir={tmp_path / 'run'}", f"data.path={prepared}"]
        return load(TrainConfig, TINY, [*SMALL, *paths, "data.workers=0", *overrides])

    return make
