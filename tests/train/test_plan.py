"""Plans: fresh, going on, from a checkpoint; and what is refused before a cluster starts."""

import dataclasses
import json
import logging
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import gptmoe
from gptmoe import data
from gptmoe.checkpoint import checkpoint_name, latest, save, whole
from gptmoe.config import to_dict
from gptmoe.errors import CheckpointError, ConfigError, DataError, GptMoeError
from gptmoe.loaded import LoadedModel
from gptmoe.metrics import read
from gptmoe.model.initialize import initialize
from gptmoe.model.transformer import GPT
from gptmoe.text import load_tokenizer, train_jiebabpe
from tests.train.alone import run_alone
from tests.train.conftest import TOKENIZER, Configure
from tests.train.test_worker import losses
from train.config import TrainConfig
from train.plan import RunPlan, make_plan, steps_of
from train.schedule import learning_rate


def test_a_fresh_plan_is_complete_and_travels(configure: Configure, prepared: Path) -> None:
    config = configure("parallel.ep=2")
    plan = make_plan("pretrain", config)
    assert (plan.resume_from, plan.weights_from, plan.done) == (None, None, 0)
    assert (plan.max_steps, plan.has_validation) == (40, True)
    assert plan.config.parallel.dp == 2
    assert (plan.data_folder, plan.tokenizer_path) == (prepared, config.data.tokenizer)
    assert plan.run_dir.is_absolute()
    assert pickle.loads(pickle.dumps(plan)) == plan
    stored = plan.stored_config()
    assert json.loads(json.dumps(stored)) == stored
    assert (stored["kind"], stored["model"]["num_experts"]) == ("pretrain", [12, 12])
    assert plan.in_words() == f"{plan.run_dir} starts, to step 40"


def test_names_of_runs_are_readable_and_never_meet(configure: Configure, tmp_path: Path) -> None:
    def name(folder: str) -> str:
        return make_plan("pretrain", configure(f"run.dir={tmp_path / folder}")).run_name

    names = [name("a/诗 词"), name("b/诗 词"), name("a/poems of 李白"), name("a/poems")]
    assert [n.rpartition("-")[0] for n in names] == ["run", "run", "poems-of", "poems"]
    assert all(n.isascii() for n in names)  # Ray's placement groups have no other names
    assert len(set(names)) == 4
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert name("link/poems") == names[3]


def test_a_plan_goes_on_from_the_newest_checkpoint(configure: Configure, trained: Path) -> None:
    plan = make_plan("pretrain", configure())
    assert plan.resume_from == trained / "checkpoints" / checkpoint_name(2)
    assert plan.done == 2
    assert plan.in_words() == f"{trained} goes on after step 2, to step 40"
    complete = make_plan("pretrain", configure("train.max_steps=2"))
    assert complete.in_words() == (
        f"{trained} is complete: 2 of 2 steps are done; "
        "raise train.max_steps or train.epochs to go on"
    )


def test_a_damaged_newest_checkpoint_is_passed_over(configure: Configure, trained: Path) -> None:
    run_alone(make_plan("pretrain", configure("train.max_steps=4")))
    shard = next((trained / "checkpoints" / checkpoint_name(4)).glob("weights-*"))
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    assert make_plan("pretrain", configure()).done == 2
    shutil.rmtree(trained / "checkpoints" / checkpoint_name(2))
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints in .* are damaged"):
        make_plan("pretrain", configure())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.d_ff=48", "another model: it began with {'d_ff': 96}, now it is {'d_ff': 48}"),
        (
            "router.kind=s_base",
            "another model: it began with {'router': {'kind': 'switch'}}, "
            "now it is {'router': {'kind': 's_base'}}",
        ),
        ("run.seed=5", "another run.seed: it began with 0, now it is 5"),
        ("data.seq_len=32", "another data.seq_len: it began with 16, now it is 32"),
        ("train.batch_tokens=512", "another train.batch_tokens: it began with 256, now it is 512"),
    ],
)
@pytest.mark.usefixtures("trained")
def test_a_run_does_not_go_on_as_another(configure: Configure, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan("pretrain", configure(override))
    assert message in str(caught.value)
    assert str(caught.value).endswith("; restore it, or choose another run.dir")


@pytest.mark.usefixtures("trained")
def test_nor_with_other_words_data_or_aims(
    configure: Configure, pairs: Path, tmp_path: Path
) -> None:
    other = train_jiebabpe(["春风又绿江南岸，明月何时照我还。"], 300)
    other.save(tmp_path / "other")
    before, now = load_tokenizer(TOKENIZER).digest, other.digest
    with pytest.raises(
        ConfigError, match=f"another tokenizer: it began with {before}, now .*{now}"
    ):
        make_plan("pretrain", configure(f"data.tokenizer={tmp_path / 'other'}"))
    with pytest.raises(ConfigError, match="another command: it began with pretrain, now it is fin"):
        make_plan("finetune", configure(f"data.path={pairs}"))
    text = tmp_path / "other.txt"
    text.write_text("春眠不觉晓，处处闻啼鸟。\n" * 40, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"another training data: it began with .*, now it is"):
        make_plan("pretrain", configure(f"data.path={text}"))


def test_the_same_data_elsewhere_is_the_same_data(
    configure: Configure, prepared: Path, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared, tmp_path / "moved")
    assert make_plan("pretrain", configure(f"data.path={tmp_path / 'moved'}")).done == 2


def rates(plan: RunPlan, steps: range) -> list[float]:
    return [learning_rate(plan.config.schedule, step) for step in steps]


@pytest.mark.parametrize("bound", ["max_steps", "epochs"])
def test_a_longer_run_keeps_its_horizon_and_so_its_rates(
    configure: Configure, prepared: Path, bound: str
) -> None:
    num_samples = data.open_samples(prepared, "train", 16, 0).num_samples
    short, long = (4, 6) if bound == "max_steps" else (0.2, 0.4)
    config = configure("train.max_steps=1000", "checkpoint.every_steps=0")
    schedule = dataclasses.replace(config.schedule, horizon_steps=None)
    config = dataclasses.replace(config, schedule=schedule)

    def bounded(value: float) -> TrainConfig:
        ends = {"max_steps": None, "epochs": None, bound: value}
        loop = dataclasses.replace(config.train, **ends)
        return dataclasses.replace(config, train=loop)

    first = make_plan("pretrain", bounded(short))
    assert first.config.schedule.horizon_steps == first.max_steps
    run_alone(first)
    second = make_plan("pretrain", bounded(long))
    assert second.max_steps > first.max_steps == second.done
    assert rates(second, range(1, 20)) == rates(first, range(1, 20))
    if bound == "epochs":
        assert first.max_steps == math.ceil(0.2 * num_samples / 16)

    named = dataclasses.replace(
        bounded(long), schedule=dataclasses.replace(schedule, horizon_steps=100)
    )
    assert make_plan("pretrain", named).config.schedule.horizon_steps == 100


def test_epochs_become_steps_and_the_earlier_end_counts(configure: Configure) -> None:
    assert steps_of(configure("train.epochs=2"), num_samples=100) == 13  # 200 samples, 16 a step
    assert steps_of(configure("train.epochs=2", "train.max_steps=5"), num_samples=100) == 5
    assert steps_of(configure("train.epochs=0.5", "train.max_steps=500"), num_samples=100) == 4


def finetuning(config: TrainConfig, source: Path) -> TrainConfig:
    """The config with the model and tokenizer of a checkpoint, and nothing else about a model."""
    model = dataclasses.replace(
        config.model,
        checkpoint=source,
        **dict.fromkeys(("num_layers", "d_model", "num_heads", "vocab_size", "max_seq_len")),
        num_experts=None,
        init_std=None,
    )
    return dataclasses.replace(
        config, model=model, data=dataclasses.replace(config.data, tokenizer=None)
    )


def test_finetuning_takes_model_and_tokenizer_of_the_checkpoint(
    configure: Configure, trained: Path, pairs: Path, tmp_path: Path
) -> None:
    config = configure(
        f"run.dir={tmp_path / 'tuned'}", f"data.path={pairs}", "router.group_sequences=2"
    )
    plan = make_plan("finetune", finetuning(config, trained))
    assert plan.weights_from == latest(trained)
    assert plan.tokenizer_path == latest(trained)
    assert plan.resume_from is None
    assert (plan.spec.d_model, plan.spec.max_seq_len) == (24, 128)
    assert plan.spec.router.group_sequences == 2
    assert data.Manifest.load(plan.data_folder).has_targets


def test_a_finetuning_that_goes_on_needs_its_source_no_more(
    configure: Configure, trained: Path, pairs: Path, tmp_path: Path
) -> None:
    def config(*words: str) -> TrainConfig:
        paths = (f"run.dir={tmp_path / 'tuned'}", f"data.path={pairs}")
        return finetuning(configure(*paths, "train.max_steps=2", *words), trained)

    plan = make_plan("finetune", config())
    run_alone(plan)
    shutil.rmtree(trained)
    own = latest(tmp_path / "tuned")
    restarted = plan.from_newest_checkpoint()  # what the workers of a run do that is still going
    assert (restarted.resume_from, restarted.tokenizer_path) == (own, own)
    again = make_plan("finetune", config("train.max_steps=3"))
    assert (again.resume_from, again.weights_from, again.tokenizer_path) == (own, None, own)
    assert again.spec == plan.spec
    assert losses(run_alone(again))[-1][0] == 3


def test_a_long_position_table_survives_finetuning_on_short_examples(
    configure: Configure, trained: Path, pairs: Path, tmp_path: Path
) -> None:
    spec = dataclasses.replace(gptmoe.load(trained).spec, max_seq_len=2048)
    network = GPT(spec)
    initialize(network, 3)
    source = tmp_path / "long" / "checkpoints" / checkpoint_name(1)
    save(
        source,
        rank=0,
        world=1,
        barrier=lambda: None,
        groups={"weights": [whole(n, p.detach()) for n, p in network.named_parameters()]},
        config={"model": to_dict(spec)},
        progress={"step": 1},
        copy_files=load_tokenizer(TOKENIZER).save,
    )
    config = configure(
        f"run.dir={tmp_path / 'tuned'}",
        f"data.path={pairs}",
        "data.seq_len=128",
        "train.batch_tokens=512",
        "train.max_steps=1",
    )
    plan = make_plan("finetune", finetuning(config, source))
    assert plan.spec.max_seq_len == 2048
    run_alone(plan)
    tuned: LoadedModel = gptmoe.load(tmp_path / "tuned")
    positions = tuned.network.embed.positions.weight
    assert positions.shape == (2048, 24)
    assert (positions[:100] != network.embed.positions.weight[:100]).any()


def test_another_tokenizer_than_the_checkpoint_s_is_refused(
    configure: Configure, trained: Path, tmp_path: Path
) -> None:
    train_jiebabpe(["春风又绿江南岸"], 300).save(tmp_path / "other")
    config = configure(
        f"run.dir={tmp_path / 'tuned'}",
        f"model.checkpoint={trained}",
        f"data.tokenizer={tmp_path / 'other'}",
    )
    with pytest.raises(ConfigError, match=r"is not the tokenizer of .*; leave data.tokenizer out"):
        make_plan("finetune", config)


def test_finetuning_from_nothing_is_said_aloud(
    configure: Configure, pairs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_plan("finetune", configure(f"data.path={pairs}"))
    assert "finetuning starts from random weights: model.checkpoint is not given" in caplog.text


Change = Callable[[Configure, Path, Path], tuple[str, TrainConfig]]

REFUSED: dict[str, tuple[Change, type[GptMoeError], str]] = {
    "no tokenizer": (
        lambda configure, pairs, tmp: (
            "pretrain",
            dataclasses.replace(
                configure(), data=dataclasses.replace(configure().data, tokenizer=None)
            ),
        ),
        ConfigError,
        "data.tokenizer is missing; name a tokenizer.json, for example one made by gptmoe tok",
    ),
    "prepared for the other command": (
        lambda configure, pairs, tmp: ("finetune", configure()),
        ConfigError,
        "was prepared for pretrain, this run wants finetune; prepare it again",
    ),
    "columns of prepared data": (
        lambda configure, pairs, tmp: ("pretrain", configure("data.columns.text=poem")),
        ConfigError,
        "data.columns means nothing to data.path=",
    ),
    "validation beside prepared data": (
        lambda configure, pairs, tmp: ("pretrain", configure(f"data.validation_path={pairs}")),
        ConfigError,
        "which is prepared already; give it to gptmoe data prepare, or name raw files",
    ),
    "no such data": (
        lambda configure, pairs, tmp: ("pretrain", configure(f"data.path={tmp / 'none.txt'}")),
        DataError,
        "none.txt does not exist; check the path",
    ),
    "no such checkpoint": (
        lambda configure, pairs, tmp: ("finetune", configure(f"model.checkpoint={tmp / 'none'}")),
        CheckpointError,
        "none is not a folder; name a checkpoint, a run's folder",
    ),
    "a missing column": (
        lambda configure, pairs, tmp: ("pretrain", configure(f"data.path={pairs}")),
        DataError,
        "text",
    ),
    "a short corpus": (
        lambda configure, pairs, tmp: (
            "pretrain",
            configure("data.seq_len=64", f"data.path={short(tmp)}"),
        ),
        DataError,
        "one sample needs 65; give more text or set data.seq_len to",
    ),
}


def short(folder: Path) -> Path:
    path = folder / "short.txt"
    path.write_text("春眠不觉晓。\n\n处处闻啼鸟。\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused(
    configure: Configure, pairs: Path, tmp_path: Path, case: str
) -> None:
    change, kind_of_error, message = REFUSED[case]
    kind, config = change(configure, pairs, tmp_path)
    with pytest.raises(kind_of_error) as caught:
        make_plan(kind, config)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_without_a_validation_split_a_run_goes_without(
    configure: Configure, pairs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        plan = make_plan(
            "finetune",
            configure(f"data.path={pairs}", "data.validation_fraction=0", "train.max_steps=2"),
        )
    assert "has no validation split: no validation loss will be recorded" in caplog.text
    assert not plan.has_validation
    assert [sorted(set(record) & {"loss", "val_loss"}) for record in run_alone(plan)] == [
        ["loss"],
        ["loss"],
    ]
    assert read(plan.run_dir / "metrics.jsonl")[-1]["step"] == 2


def test_progress_of_the_preparation_reaches_the_caller(configure: Configure, pairs: Path) -> None:
    seen: list[data.Progress] = []
    make_plan("finetune", configure(f"data.path={pairs}"), seen.append)
    assert seen[-1].fraction == 1.0
    assert seen[-1].documents >= 59  # the last may not be assigned to a split yet
