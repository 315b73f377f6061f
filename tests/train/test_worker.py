"""A whole run in one process: when it validates and saves, and what a failed save leaves."""

import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

import gptmoe
from gptmoe import data
from gptmoe.checkpoint import open_checkpoint
from gptmoe.errors import CheckpointError
from gptmoe.evaluate import evaluate
from gptmoe.metrics import read
from gptmoe.parallel.loss_scale import LossScale
from gptmoe.parallel.mesh import single
from tests.train.alone import run_alone
from tests.train.conftest import Configure
from train.plan import make_plan
from train.worker import Worker


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def validated(run_dir: Path) -> list[int]:
    return [record["step"] for record in read(run_dir / "metrics.jsonl") if "val_loss" in record]


def test_validation_and_saving_are_done_when_due_and_at_the_end(configure: Configure) -> None:
    config = configure(
        "train.max_steps=7",
        "train.validate_every_steps=3",
        "train.validation_samples=8",
        "checkpoint.every_steps=2",
        "checkpoint.keep=2",
    )
    run_alone(make_plan("pretrain", config))
    assert validated(config.run.dir) == [3, 6, 7]
    assert checkpoints(config.run.dir) == ["step-00000006", "step-00000007"]
    stored = open_checkpoint(config.run.dir)
    assert stored.progress == {"step": 7, "samples": 7 * 16}
    assert stored.config["kind"] == "pretrain"


def test_each_epoch_ends_with_a_validation(configure: Configure, pairs: Path) -> None:
    config = configure(
        f"data.path={pairs}", "train.epochs=2", "train.max_steps=100",
        "train.validate_every_steps=0", "checkpoint.every_steps=0",
    )  # fmt: skip
    plan = make_plan("finetune", config)
    num_samples = data.open_samples(plan.data_folder, "train", 16, 0).num_samples
    run_alone(plan)
    assert validated(config.run.dir) == [-(-num_samples // 16), -(-2 * num_samples // 16)]
    assert checkpoints(config.run.dir) == [f"step-{plan.max_steps:08d}"]


def test_the_recorded_validation_is_that_of_the_saved_model(
    configure: Configure, prepared: Path
) -> None:
    config = configure("train.max_steps=2", "train.validation_samples=0")
    records = run_alone(make_plan("pretrain", config))
    model = gptmoe.load(config.run.dir)
    result = evaluate(
        model.network,
        data.open_samples(prepared, "validation", 16, 0),
        model.tokenizer.characters_per_token(),
        batch_size=4,
    )
    found = next(record for record in records if "val_loss" in record)
    assert found["val_loss"] == pytest.approx(result.loss, rel=1e-6)
    assert found["val_perplexity"] == pytest.approx(result.perplexity, rel=1e-5)
    assert found["bits_per_char"] == pytest.approx(result.bits_per_char, rel=1e-6)


def losses(records: list[dict[str, float]]) -> list[tuple[float, float]]:
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


def test_a_run_in_two_parts_is_the_run_in_one(configure: Configure, tmp_path: Path) -> None:
    parts = ("model.dropout=0.1", "schedule.horizon_steps=6")
    whole = run_alone(
        make_plan("pretrain", configure(*parts, "train.max_steps=5", f"run.dir={tmp_path / 'a'}"))
    )
    run_alone(make_plan("pretrain", configure(*parts, "train.max_steps=3")))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 9.9}\n{"step": 5, "lo')  # what a kill may leave
    second = make_plan("pretrain", configure(*parts, "train.max_steps=5"))
    assert losses(run_alone(second)) == losses(whole)
    assert open_checkpoint(tmp_path / "run").progress == {"step": 5, "samples": 80}


def test_narrow_products_learn_alike_and_save_wide_weights(configure: Configure) -> None:
    parts = ("train.max_steps=3", "checkpoint.every_steps=0", "train.validation_samples=8")
    wide = losses(run_alone(make_plan("pretrain", configure(*parts))))
    config = configure(*parts, "train.dtype=bfloat16", f"run.dir={configure().run.dir}-narrow")
    narrow = losses(run_alone(make_plan("pretrain", config)))
    assert narrow != wide
    assert dict(narrow) == pytest.approx(dict(wide), rel=1e-2)
    stored = open_checkpoint(config.run.dir)
    assert {stored.dtype(name) for name in stored.names()} == {torch.float32}


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Nothing can be written beyond this size, as on a disk that has no more room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("trained")
def test_a_disk_without_room_keeps_the_earlier_checkpoint(configure: Configure) -> None:
    config = configure("train.max_steps=4")
    plan = make_plan("pretrain", config)
    with (
        file_size_limit(200_000),
        pytest.raises(
            CheckpointError,
            match=r"step-00000004 was not saved: File too large; earlier ones are untouched",
        ),
    ):
        run_alone(plan)
    assert checkpoints(config.run.dir) == ["step-00000002"]
    assert open_checkpoint(config.run.dir).progress["step"] == 2
    assert losses(run_alone(make_plan("pretrain", config)))[-1][0] == 4


@pytest.mark.usefixtures("trained")
def test_a_full_disk_is_a_warning_until_the_last_step_and_no_record_is_torn(
    configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    config = configure("train.max_steps=5", "checkpoint.every_steps=1")
    room = (config.run.dir / "metrics.jsonl").stat().st_size + 100  # not enough for a line
    with (
        file_size_limit(room),
        caplog.at_level(logging.WARNING),
        pytest.raises(CheckpointError, match="step-00000005 was not saved"),
    ):
        run_alone(make_plan("pretrain", config))
    assert "metrics.jsonl is not written, File too large: lines wait for room" in caplog.text
    assert "TRAINING GOES ON WITHOUT A NEW CHECKPOINT" in caplog.text
    assert losses(run_alone(make_plan("pretrain", config)))[-1][0] == 5


@pytest.mark.usefixtures("trained")
def test_ranks_do_not_read_what_was_checked_when_it_was_chosen(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each of them would read the parts of all others before the first step."""
    plan = make_plan("pretrain", configure("train.dtype=float16"))
    checked: list[bool] = []
    monkeypatch.setattr(
        "gptmoe.checkpoint.read.check", lambda path, record, checksum: checked.append(checksum)
    )
    worker = Worker.start(plan, single(), torch.device("cpu"), recorders=[], heartbeat=print)
    worker.saver.close()
    assert worker.plan.done == 2
    assert set(checked) == {False}


def test_float16_goes_on_with_its_loss_scale(configure: Configure) -> None:
    parts = ("train.dtype=float16", "train.validation_samples=8", "checkpoint.every_steps=0")
    records = run_alone(make_plan("pretrain", configure(*parts, "train.max_steps=2")))
    assert [record["loss_scale"] for record in records if "loss" in record] == [2.0**16] * 2
    second = make_plan("pretrain", configure(*parts, "train.max_steps=3"))
    assert second.loss_scale is not None
    assert second.loss_scale.clean_steps == 2
    assert len(losses(run_alone(second))) == 3


def test_float16_goes_on_from_a_checkpoint_made_before_the_first_clean_step(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step so far has overflowed: the optimizer has no state yet."""
    monkeypatch.setattr("train.plan.LossScale", partial(LossScale, value=2.0**60))
    parts = ("train.dtype=float16", "train.validation_samples=8", "checkpoint.every_steps=0")
    records = run_alone(make_plan("pretrain", configure(*parts, "train.max_steps=1")))
    assert [record["overflow"] for record in records if "loss" in record] == [1.0]
    second = make_plan("pretrain", configure(*parts, "train.max_steps=2"))
    assert second.done == 1
    assert [r["loss_scale"] for r in run_alone(second) if "loss" in r] == [2.0**60, 2.0**59]
