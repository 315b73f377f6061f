"""gptmoe.model.presets: names, shapes and recipes of the known sizes."""

import pytest

from gptmoe.errors import ConfigError
from gptmoe.model.counts import parameters
from gptmoe.model.presets import ALIASES, PRESETS, preset

MIXTURES = ("0.35B+MoE-64", "1.3B+MoE-32", "1.3B+MoE-64", "2.7B+MoE-64", "3.6B+MoE-64")


def test_a_preset_is_a_model_and_its_recipe() -> None:
    known = preset("1.3B+MoE-64")
    assert (known.spec.num_layers, known.spec.d_model, known.spec.num_heads) == (24, 2048, 32)
    assert known.spec.num_experts == (64,) * 12
    assert known.spec.moe_layers == tuple(range(1, 24, 2))
    assert (known.learning_rate, known.min_learning_rate) == (1.6e-4, 1.6e-5)
    assert known.batch_tokens == 1_048_576


@pytest.mark.parametrize(
    ("name", "num_layers", "d_model", "num_heads", "learning_rate", "batch_tokens"),
    [
        ("0.125B", 12, 768, 12, 6e-4, 524_288),
        ("0.35B", 24, 1024, 16, 3e-4, 524_288),
        ("0.76B", 24, 1536, 16, 2.5e-4, 524_288),
        ("1.3B", 24, 2048, 32, 2e-4, 1_048_576),
        ("2.7B", 32, 2560, 32, 1.6e-4, 1_048_576),
        ("3.6B", 30, 3072, 32, 1.6e-4, 1_048_576),
        ("6.7B", 32, 4096, 32, 1.2e-4, 2_097_152),
        ("13B", 40, 5120, 40, 1e-4, 6_291_456),
        ("30B", 48, 7168, 56, 1e-4, 6_291_456),
        ("175B", 96, 12288, 96, 1.2e-4, 6_291_456),
        ("0.35B+MoE-64", 24, 1024, 16, 3e-4, 524_288),
        ("1.3B+MoE-32", 24, 2048, 32, 2e-4, 1_048_576),
        ("1.3B+MoE-64", 24, 2048, 32, 1.6e-4, 1_048_576),
        ("2.7B+MoE-64", 32, 2560, 32, 1.6e-4, 1_048_576),
        ("3.6B+MoE-64", 30, 3072, 32, 1.6e-4, 1_048_576),
    ],
)
def test_the_tables(
    name: str,
    num_layers: int,
    d_model: int,
    num_heads: int,
    learning_rate: float,
    batch_tokens: int,
) -> None:
    known = PRESETS[name]
    assert known.name == name
    assert (known.spec.num_layers, known.spec.d_model) == (num_layers, d_model)
    assert known.spec.num_heads == num_heads
    assert (known.learning_rate, known.batch_tokens) == (learning_rate, batch_tokens)
    assert known.min_learning_rate == pytest.approx(learning_rate / 10, rel=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_fixed_options_are_those_of_every_size(name: str) -> None:
    known = PRESETS[name]
    spec = known.spec
    assert spec.d_ff == 4 * spec.d_model
    assert (spec.vocab_size, spec.max_seq_len, spec.init_std) == (51_200, 2048, 0.006)
    assert (known.seq_len, known.weight_decay) == (2048, 0.1)
    assert (known.beta1, known.beta2) == (0.9, 0.95)
    assert known.max_grad_norm == 1.0
    assert known.batch_tokens % known.seq_len == 0


def test_aliases_name_the_same_preset() -> None:
    assert ALIASES == {"base": "0.125B", "large": "0.35B"}
    assert preset("base") is preset("0.125B")
    assert preset("large+MoE-64") == preset("0.35B+MoE-64")


@pytest.mark.parametrize("written", ["1.3B+64", "1.3B+MoE64", "1.3B+moe-64", "1.3B+MoE-064"])
def test_spellings_of_a_mixture(written: str) -> None:
    assert preset(written) is PRESETS["1.3B+MoE-64"]


def test_any_dense_size_takes_any_number_of_experts() -> None:
    mixture, dense = preset("0.76B+MoE-6"), preset("0.76B")
    assert mixture.name == "0.76B+MoE-6"
    assert mixture.spec.num_experts == (6,) * 12
    assert mixture.learning_rate == dense.learning_rate
    assert parameters(mixture.spec).total > parameters(dense.spec).total


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("1.4B", "model.preset='1.4B' is not known; did you mean 1.3B"),
        ("1.3B+MoE-x", "did you mean 1.3B+MoE-64 or 1.3B+MoE-32"),
        ("1.3B+MoE-64+8", "any dense size takes experts, for example 1.3B+MoE-64"),
        ("", "sizes: 0.125B, 0.35B, 0.76B"),
        ("1.3B+MoE-0", "asks for 0 experts; leave out the + part for 1.3B"),
    ],
)
def test_unknown_names_say_what_to_write(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        preset(name)
    assert message in str(raised.value)


def test_listed_names_are_dense_first() -> None:
    assert tuple(PRESETS)[-len(MIXTURES) :] == MIXTURES
    assert all(not PRESETS[name].spec.num_experts for name in tuple(PRESETS)[: -len(MIXTURES)])
