"""A checkpoint in one process: what it answers, and what it refuses to open."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gptmoe
from gptmoe.checkpoint import save, whole
from gptmoe.config import to_dict
from gptmoe.errors import CheckpointError, ConfigError, RequestError
from gptmoe.generate.packed import PackedExperts
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.quantized import quantized
from gptmoe.model.initialize import initialize
from gptmoe.model.layers import ServedWeight
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT
from gptmoe.stored import EXPERT_WEIGHTS
from gptmoe.text import Tokenizer, load_tokenizer

ROOT = Path(__file__).parents[2]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(ROOT / "configs" / "corpus")


@pytest.fixture(scope="module")
def spec(tokenizer: Tokenizer) -> ModelSpec:
    return ModelSpec(
        num_layers=2,
        d_model=32,
        num_heads=2,
        d_ff=64,
        vocab_size=tokenizer.vocab_size,
        max_seq_len=64,
        num_experts=(4,),
        init_std=0.3,
    )


@pytest.fixture(scope="module")
def network(spec: ModelSpec) -> GPT:
    network = GPT(spec)
    initialize(network, seed=2)
    return network.eval()


@pytest.fixture(scope="module")
def write(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, spec: ModelSpec, network: GPT
) -> Write:
    """Write a checkpoint of `network`, or of something else."""

    def write_one(
        model: object = None, tensors: dict[str, Tensor] | None = None, **more: Any
    ) -> Path:
        run = tmp_path_factory.mktemp("run")
        weights = {n: p.detach() for n, p in network.named_parameters()} | (tensors or {})
        save(
            run / "checkpoints" / "step-00000007",
            rank=0,
            world=1,
            barrier=lambda: None,
            groups={"weights": [whole(name, tensor) for name, tensor in weights.items()]},
            config=more or {"model": model or to_dict(spec), "train": {"seed": 1}},
            progress={"step": 7, "samples": 0, "tokens": 0},
            copy_files=tokenizer.save,
        )
        return run

    return write_one


@pytest.fixture(scope="module")
def run(write: Write) -> Path:
    return write()


@pytest.fixture(scope="module")
def model(run: Path) -> gptmoe.LoadedModel:
    return gptmoe.load(run)


def make_tokens(model: gptmoe.LoadedModel, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.spec.vocab_size, (rows, length), generator=generator)


def test_what_a_loaded_model_knows(
    model: gptmoe.LoadedModel, run: Path, spec: ModelSpec, tokenizer: Tokenizer
) -> None:
    assert model.spec == spec
    assert model.tokenizer.digest == tokenizer.digest
    assert model.config["train"] == {"seed": 1}
    assert model.path == run / "checkpoints" / "step-00000007"
    assert gptmoe.load(model.path).spec == gptmoe.load(str(run / "checkpoints")).spec == spec
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


def test_logits_are_those_of_training(model: gptmoe.LoadedModel, network: GPT) -> None:
    tokens_BT = make_tokens(model, 3, 64)
    with torch.no_grad():
        expected = network.logits(network(tokens_BT).hidden_BTD)
    found = model.logits(tokens_BT)
    assert found.shape == (3, 64, model.spec.vocab_size)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert torch.equal(model.logits(tokens_BT.tolist()), found)


def test_logits_come_in_parts_where_there_are_many(
    model: gptmoe.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens_BT = make_tokens(model, 5, 9)
    expected = model.logits(tokens_BT)
    monkeypatch.setattr("gptmoe.loaded.LOGITS_TOKENS", 20)
    assert torch.equal(model.logits(tokens_BT), expected)


@pytest.mark.parametrize(
    ("dtype", "wide", "close"),
    [
        ("float32", torch.float32, 1e-5),
        ("bfloat16", torch.float32, 5e-2),
        ("float64", torch.float64, 1e-5),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_other_types_are_near(
    run: Path, model: gptmoe.LoadedModel, dtype: str, wide: torch.dtype, close: float, packed: bool
) -> None:
    other = gptmoe.load(run, dtype, packed=packed)
    block = other.network.layers[1]
    assert block.norm_ffn.weight.dtype == block.ffn.router.weight.dtype == wide
    assert str(block.attention.qkv.weight.dtype) == f"torch.{dtype}"
    is_packed = packed and dtype != "float64"
    assert isinstance(block.attention.qkv.weight, ServedWeight) == is_packed
    tokens_BT = make_tokens(model, 2, 12)
    expected = model.logits(tokens_BT)
    scale = float(expected.abs().max())
    assert torch.allclose(other.logits(tokens_BT).float(), expected, rtol=0, atol=close * scale)


def test_generate_one_text_or_several(model: gptmoe.LoadedModel) -> None:
    prompts = ["春风", "明月几时有", "江上", "春风"] * 5
    one_by_one = [model.generate(p, max_new_tokens=9, seed=3, top_k=20) for p in prompts]
    assert model.generate(prompts, max_new_tokens=9, seed=3, top_k=20) == one_by_one
    assert one_by_one[0] == one_by_one[3]
    assert model.generate([], max_new_tokens=9) == []


def test_greedy_text_is_the_argmax_of_the_logits(model: gptmoe.LoadedModel) -> None:
    token_ids = model.tokenizer.encode("春风")
    prompt = len(token_ids)
    ends = {model.tokenizer.end_id, model.tokenizer.sep_id}
    for _ in range(8):
        token = int(model.logits([token_ids])[0, -1].argmax())
        if token in ends:
            break
        token_ids.append(token)
    text = model.generate("春风", max_new_tokens=8, temperature=0)
    assert text == model.tokenizer.decode(token_ids[prompt:])


def test_a_stream_is_the_text_in_pieces(model: gptmoe.LoadedModel) -> None:
    pieces = list(model.stream("春风", max_new_tokens=12, seed=5))
    assert len(pieces) > 1
    assert all(pieces)
    assert "".join(pieces) == model.generate("春风", max_new_tokens=12, seed=5)


@pytest.mark.parametrize("more", [{"n": 2}, {"n": 2, "num_beams": 3, "temperature": 0.0}])
def test_a_stream_is_the_first_answer_of_several(
    model: gptmoe.LoadedModel, more: dict[str, Any]
) -> None:
    expected = model.generate("春风", max_new_tokens=12, seed=5, **more)
    assert "".join(model.stream("春风", max_new_tokens=12, seed=5, **more)) == expected


def test_stop_is_one_string_or_several(model: gptmoe.LoadedModel) -> None:
    text = model.generate("春风", max_new_tokens=12, seed=5)
    stop = text[len(text) // 2]
    before = text[: text.index(stop)]
    for given in (stop, [stop], ("nowhere in it", stop)):
        assert model.generate("春风", max_new_tokens=12, seed=5, stop=given) == before


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temprature": 1}, "unknown sampling parameter temprature; known: temperature, top_k, "),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 1; found -1"),
        ({"temperature": "hot"}, "temperature must be a number; found 'hot'"),
    ],
)
def test_bad_sampling(model: gptmoe.LoadedModel, sampling: dict[str, Any], message: str) -> None:
    for call in (model.generate, model.stream):  # a stream says so before its first piece
        with pytest.raises(RequestError, match=f"^{message}"):
            call("春风", **sampling)


def test_every_sampling_parameter_is_a_keyword(model: gptmoe.LoadedModel) -> None:
    given = {name: getattr(SamplingParams(), name) for name in SamplingParams.__dataclass_fields__}
    assert model.generate("春风", **given | {"max_new_tokens": 2})


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([], "token_ids must have 1 to 64 tokens a row; found 0"),
        ([[]], "token_ids must have 1 to 64 tokens a row; found 0"),
        ([[1] * 65], "token_ids must have 1 to 64 tokens a row; found 65"),
        ([[1, 2], [1]], "token_ids must have rows of one length; found 1 and 2"),
        ([[1, -1]], "token_ids must be 0 to 3071; found -1"),
        ([[3072]], "token_ids must be 0 to 3071; found 3072"),
        ([1, 2], "token_ids must be rows of token ids"),
        ([["春"]], "token_ids must be rows of token ids"),
    ],
)
def test_bad_token_ids(
    model: gptmoe.LoadedModel, token_ids: Sequence[Sequence[int]], message: str
) -> None:
    with pytest.raises(RequestError, match=f"^{message}$"):
        model.logits(token_ids)


def test_unknown_types_and_devices(run: Path) -> None:
    known = "float32, bfloat16, float64"
    with pytest.raises(ConfigError, match=f"^dtype='int4' is not known; use one of {known}$"):
        gptmoe.load(run, dtype="int4")
    with pytest.raises(ConfigError, match=r"^device='cuda:99' is not here; use one of cpu"):
        gptmoe.load(run, device="cuda:99")
    with pytest.raises(ConfigError, match=r"^weights='int3' is not known; use int8 or int4, or"):
        gptmoe.load(run, weights="int3")
    with pytest.raises(ConfigError, match=r'^weights="int8" computes in float32 or bfloat16'):
        gptmoe.load(run, "float64", weights="int8")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_are_rounded_as_they_are_stored(run: Path, weights: str, network: GPT) -> None:
    """Not after a rounding to the type that computes; what is not rounded has that type."""
    model = gptmoe.load(run, "bfloat16", weights=weights)
    head = quantized(network.embed.tokens.weight, weights, torch.bfloat16)  # type: ignore[arg-type]
    hidden_BTD = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(model.network.logits(hidden_BTD), head.product(hidden_BTD))
    assert model.network.embed.tokens.weight.dtype == torch.bfloat16
    assert model.network.norm.weight.dtype == torch.float32
    assert isinstance(model.generate("春风", max_new_tokens=4, temperature=0), str)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_beyond_the_memory_stay_mapped(
    write: Write, network: GPT, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other layers are packed. Experts of another type are in memory anyway: they are packed."""
    run = write()
    half = 2 * sum(
        p.nbytes for name, p in network.named_parameters() if name.endswith(EXPERT_WEIGHTS)
    )
    for available, copied in ((half, True), (half - 1, dtype != "float32"), (None, True)):
        monkeypatch.setattr("gptmoe.loaded.available_bytes", lambda free=available: free)
        model = gptmoe.load(run, dtype)
        moe = model.network.layers[1].ffn
        assert isinstance(moe.experts, PackedExperts) == copied
        assert isinstance(model.network.layers[0].attention.qkv.weight, ServedWeight)
        answer = model.logits([[1, 2, 3]])
        if available == half:
            expected = answer
        assert torch.allclose(answer, expected, rtol=0, atol=1e-4)


def test_checksums_are_compared_unless_told_otherwise(write: Write) -> None:
    run = write()
    file = next(run.rglob("weights-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is corrupt: its checksum does not match"):
        gptmoe.load(run)
    assert gptmoe.load(run, verify=False).spec.d_model == 32
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="is damaged: it has"):
        gptmoe.load(run, verify=False)


def test_a_tokenizer_of_another_model(write: Write, spec: ModelSpec) -> None:
    small = to_dict(spec) | {"vocab_size": 100}
    message = "the tokenizer has 3072 tokens, but the model only 100; they do not belong together"
    with pytest.raises(CheckpointError, match=message):
        gptmoe.load(write(small))


def test_a_weight_of_another_shape(write: Write) -> None:
    run = write(tensors={"layers.0.ffn.up.bias": torch.zeros(65)})
    message = (
        r"layers.0.ffn.up.bias has shape \[65\], the config wants \[64\]; "
        "the folder mixes two models"
    )
    with pytest.raises(CheckpointError, match=message):
        gptmoe.load(run)


def test_a_config_without_a_model_of_ours(write: Write, spec: ModelSpec) -> None:
    with pytest.raises(CheckpointError, match=r"no model of ours: key model.num_layers is missing"):
        gptmoe.load(write(train={}))
    with pytest.raises(CheckpointError, match=r"no model of ours: unknown config key model.colour"):
        gptmoe.load(write(to_dict(spec) | {"colour": "red"}))
