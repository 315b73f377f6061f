"""A run whose inputs lie in an object store."""

import shutil
from pathlib import Path

import pytest

from gptmoe import config as configs
from gptmoe.checkpoint import checkpoint_name
from gptmoe.config import Uri
from gptmoe.errors import DataError
from tests.bucket import serving
from tests.train.conftest import TOKENIZER, Configure
from train.plan import make_plan


def test_a_run_fetches_what_it_reads(
    configure: Configure,
    pairs: Path,
    two_steps: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = tmp_path / "there"
    shutil.copytree(two_steps / "checkpoints", there / "tiny" / "checkpoints")
    shutil.copy(pairs, there / "pairs.jsonl")
    shutil.copy(TOKENIZER, there / "tokenizer.json")
    with serving(there, monkeypatch) as bucket:
        config = configure(
            f"data.path={bucket.uri('pairs.jsonl')}",
            f"data.validation_path={bucket.uri('pairs.jsonl')}",
            f"data.tokenizer={bucket.uri('tokenizer.json')}",
            f"model.checkpoint={bucket.uri('tiny')}",
            "router.group_sequences=2",
        )
        plan = make_plan("finetune", config)
        again = make_plan("finetune", config)
    inputs = plan.run_dir / "inputs"
    assert again == plan
    assert plan.weights_from is not None
    assert plan.weights_from.is_relative_to(inputs)
    assert plan.weights_from.name == checkpoint_name(2)
    assert plan.tokenizer_path.is_relative_to(inputs)
    assert plan.tokenizer_path.read_bytes() == TOKENIZER.read_bytes()
    assert len([name for name in bucket.read if name == "pairs.jsonl"]) == 1
    assert plan.stored_config()["train"]["data"]["path"] == bucket.uri("pairs.jsonl")
    stored = configs.build(type(config), plan.stored_config()["train"])
    assert isinstance(stored.data.path, Uri)


def test_an_input_that_cannot_be_reached_is_one_sentence(configure: Configure) -> None:
    with pytest.raises(DataError, match=r"mock:///poems.tsv does not exist; check the address"):
        make_plan("pretrain", configure("data.path=mock:///poems.tsv"))


def test_run_dir_may_be_written_as_the_uri_of_a_folder(configure: Configure) -> None:
    assert configure("run.dir=file:///shared/runs/a").run.dir == Path("/shared/runs/a")
