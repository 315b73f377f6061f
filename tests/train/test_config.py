"""A training config: what it refuses, in which words, and what it fills in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptmoe.config import build, load, to_dict
from gptmoe.errors import ConfigError, LayoutError
from gptmoe.model.presets import preset
from gptmoe.model.spec import ModelSpec, RouterSpec
from train.config import TrainConfig
from train.model_config import ModelConfig

TINY = Path(__file__).parents[2] / "configs" / "train" / "tiny.toml"


def tiny(*overrides: str) -> TrainConfig:
    return load(TrainConfig, TINY, overrides)


def spec_of(config: TrainConfig, vocabulary: int = 3072) -> ModelSpec:
    return config.model.spec(config.router, vocabulary, config.data.seq_len)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["run.dir=s3://bucket/run"],
            "run.dir begins with s3://, but a run is written to a folder: its checkpoints are "
            "committed by a rename and served through memory maps, which an object store has not; "
            "mount it, or name a folder that all nodes share",
        ),
        (["run.seed=-1"], "run.seed=-1 must be at least 0"),
        (["data.seq_len=1"], "data.seq_len=1 must be at least 2"),
        (["data.workers=-1"], "data.workers=-1 must be at least 0"),
        (["train.max_steps=0"], "train.max_steps=0 must be above 0"),
        (["train.epochs=-0.5"], "train.epochs=-0.5 must be above 0"),
        (["train.epochs=inf"], "train.epochs=inf must be above 0"),
        (["train.batch_tokens=0"], "train.batch_tokens=0 must be above 0"),
        (["train.microbatch_size=0"], "train.microbatch_size=0 must be above 0"),
        (["train.validate_every_steps=-1"], "train.validate_every_steps=-1 must be at least 0"),
        (["train.validation_samples=-1"], "train.validation_samples=-1 must be at least 0"),
        (["checkpoint.every_steps=-1"], "checkpoint.every_steps=-1 must be at least 0"),
        (["checkpoint.keep=0"], "checkpoint.keep=0 must be at least 1"),
        (
            ["train.batch_tokens=1000"],
            "train.batch_tokens=1000 must be whole sequences of data.seq_len=64; "
            "the nearest are 960 and 1024",
        ),
        (["train.batch_tokens=10"], "whole sequences of data.seq_len=64; the nearest are 64"),
        (
            ["parallel.dp=5"],
            "train.batch_tokens=3072 gives 48 sequences a step, which 5 ranks cannot share in "
            "microbatches of train.microbatch_size=4; make it a multiple of 1280 tokens, "
            "or choose a smaller microbatch_size or dp",
        ),
        (["parallel.zero=4"], "parallel.zero=4 is not known; use one of 0, 1, 2"),
        (["train.dtype=float8"], "train.dtype='float8' is not known"),
        (["optimiser.beta1=0.8"], "unknown config key optimiser; did you mean optimizer?"),
        (["train.max_step=3"], "unknown config key train.max_step; did you mean train.max_steps?"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_value_is_refused_in_one_sentence(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(*overrides)
    assert message in str(caught.value)


def test_layouts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        LayoutError, match=r"parallel.ep=3 must divide parallel.dp=4; use 1, 2 or 4"
    ):
        tiny("parallel.ep=3", "parallel.dp=4")


def plain(*without: str, **tables: dict[str, Any]) -> dict[str, Any]:
    raw = to_dict(tiny())
    for name, table in tables.items():
        raw[name] = raw[name] | table
    for key in without:
        table, _, name = key.partition(".")
        raw[table].pop(name)
    return raw


def test_a_run_needs_an_end_and_a_batch() -> None:
    with pytest.raises(ConfigError, match=r"train.max_steps or train.epochs must be given"):
        build(TrainConfig, plain("train.max_steps"))
    with pytest.raises(ConfigError, match=r"train.batch_tokens is missing; .*batch_tokens=4096"):
        build(TrainConfig, plain("train.batch_tokens"))


@pytest.mark.parametrize(
    ("overrides", "vocabulary", "message"),
    [
        ([], 4000, "model.vocab_size=3072 is smaller than the tokenizer's 4000 tokens; use model"),
        (["data.seq_len=256"], 3072, "data.seq_len=256 is longer than the model's max_seq_len=128"),
        (
            ["train.microbatch_size=6"],
            3072,
            "train.microbatch_size=6 must be a multiple of router.group_sequences=4",
        ),
        (["parallel.ep=8", "train.microbatch_size=6"], 3072, "parallel.ep=8 must divide num_exp"),
        (["parallel.ep=2", "model.num_experts=0"], 3072, "parallel.ep=2 needs experts"),
    ],
)
def test_a_run_must_fit_its_model(overrides: list[str], vocabulary: int, message: str) -> None:
    config = tiny(*overrides)
    with pytest.raises((ConfigError, LayoutError)) as caught:
        config.check_model(spec_of(config), vocabulary)
    assert message in str(caught.value)


def test_a_dense_model_has_no_routing_groups() -> None:
    config = tiny("model.num_experts=0", "train.microbatch_size=6")
    config.check_model(spec_of(config), 3072)


@pytest.mark.parametrize("missing", ["num_layers", "d_model", "num_heads"])
def test_a_model_without_preset_is_given_in_full(missing: str) -> None:
    parts = {"num_layers": 4, "d_model": 8, "num_heads": 2}
    del parts[missing]
    with pytest.raises(ConfigError, match=rf"model.{missing} is missing; .*model.preset=0.125B"):
        ModelConfig(**parts).spec(RouterSpec(), 100, 16)


def test_what_is_not_given_follows_from_tokenizer_and_data() -> None:
    spec = ModelConfig(num_layers=4, d_model=8, num_heads=2).spec(RouterSpec(), 100, 16)
    assert (spec.d_ff, spec.vocab_size, spec.max_seq_len, spec.num_experts) == (32, 100, 16, ())


@pytest.mark.parametrize("name", ["0.125B", "1.3B+MoE-64"])
def test_a_preset_fills_model_batch_and_rates(name: str) -> None:
    known = preset(name)
    raw = plain("train.batch_tokens", data={"seq_len": 2048})
    raw |= {"model": {"preset": name}, "schedule": {}}
    config = build(TrainConfig, raw).resolved(horizon_steps=1000)
    assert config.model.spec(known.spec.router, 3072, 2048) == known.spec
    assert config.train.batch_tokens == known.batch_tokens
    assert config.batch_sequences == known.batch_tokens // 2048
    assert config.schedule.learning_rate == known.learning_rate
    assert config.schedule.min_learning_rate == known.min_learning_rate


def test_parts_replace_those_of_a_preset() -> None:
    def spec(**parts: Any) -> ModelSpec:
        return ModelConfig(preset="0.35B+MoE-64", **parts).spec(RouterSpec(), 100, 16)

    assert spec(num_experts=(4,) * 12).num_experts == (4,) * 12
    assert spec(num_experts=0).num_experts == ()
    assert spec(d_model=64).d_ff == 256
    assert spec(num_layers=4).num_experts == (64, 64)
    assert spec(vocab_size=5000, max_seq_len=64, dropout=0.1).vocab_size == 5000


def test_resolving_twice_changes_nothing_and_survives_json() -> None:
    once = tiny("parallel.ep=2").resolved(horizon_steps=40)
    assert once.parallel.dp == 2
    assert once.resolved(horizon_steps=99) == once
    assert build(TrainConfig, to_dict(once)) == once


def test_ep_alone_means_as_many_workers() -> None:
    assert tiny("parallel.ep=2").parallel.layout().world == 2
    assert tiny("parallel.ep=2", "parallel.dp=4").parallel.layout().world == 4


@pytest.mark.parametrize("dp", [1, 2, 3, 4])
def test_the_tiny_config_fits_every_layout_of_up_to_four_ranks(dp: int) -> None:
    for ep in (ep for ep in (1, 2, 3, 4) if dp % ep == 0):
        config = tiny(f"parallel.dp={dp}", f"parallel.ep={ep}")
        config.check_model(spec_of(config), 3072)


STORED = ModelSpec(
    num_layers=4, d_model=96, num_heads=12, d_ff=384, vocab_size=3072, num_experts=(12, 12)
)


def test_a_checkpoint_s_model_takes_this_run_s_router_and_dropout() -> None:
    router = RouterSpec(group_sequences=2)
    refined = ModelConfig(dropout=0.1).refine(STORED, router)
    assert (refined.dropout, refined.router) == (0.1, router)
    assert refined.max_seq_len == 2048
    assert ModelConfig().refine(refined, router) == refined


def test_a_config_that_describes_the_checkpoint_s_model_is_welcome() -> None:
    model = ModelConfig(num_layers=4, d_model=96, num_heads=12, num_experts=12)
    assert model.refine(STORED, STORED.router) == STORED
    large = preset("0.35B+8").spec
    assert ModelConfig(preset="0.35B+8").refine(large, large.router) == large


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: ModelConfig(num_layers=6),
            "model.num_layers=6 is not that of model.checkpoint, 4",
        ),
        (
            lambda: ModelConfig(num_experts=8),
            "model.num_experts=(8, 8) is not that of model.checkpoint, (12, 12); leave it out",
        ),
        (lambda: ModelConfig(preset="0.125B"), "model.num_layers=12 is not that of model.checkpoi"),
    ],
)
def test_another_model_than_the_checkpoint_s_is_refused(
    model: Callable[[], ModelConfig], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        model().refine(STORED, RouterSpec())
    assert message in str(caught.value)
