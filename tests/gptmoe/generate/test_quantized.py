"""Weights in 8 and 4 bits: how near they are, and that batches change no bit there either."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptmoe.errors import ConfigError
from gptmoe.generate.quantized import (
    QuantizedExperts,
    QuantizedLinear,
    Weights,
    check,
    quantize,
    quantized,
)
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.loaded import LoadedModel
from gptmoe.loaded import load as open_model
from gptmoe.model.moe import MoE
from gptmoe.model.routers import ROUTERS
from tests import small_model

from .conftest import Make
from .test_invariance import make_tokens, requests, run

CPU = torch.device("cpu")
KINDS: tuple[Weights, ...] = ("int8", "int4")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight_OI: Tensor, kind: Weights, group: int) -> Tensor:
    """The weight that stands for this one, by the definition, in float64."""
    weight_OGI = weight_OI.double().unflatten(
        1, (-1, group if kind == "int4" else weight_OI.shape[1])
    )
    if kind == "int8":
        scale = weight_OGI.abs().amax(2, keepdim=True) / 127
        return (scale * (weight_OGI / scale).round()).flatten(1)
    largest = weight_OGI.abs().argmax(2, keepdim=True)
    scale = weight_OGI.gather(2, largest) / -8
    return (scale * (weight_OGI / scale).round().clamp(-8, 7)).flatten(1)


@each_kind
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(48, 96, 32), (100, 128, 64), (3, 32, 32)]
)
def test_a_product_uses_the_rounded_weights(
    kind: Weights, outputs: int, inputs: int, group: int
) -> None:
    weight_OI, x_RI = random(outputs, inputs), random(5, inputs, seed=1)
    held = quantized(weight_OI, kind, torch.float32)
    expected_RO = x_RI.double() @ rounded(weight_OI, kind, group).t()
    found_RO = held.product(x_RI)
    assert found_RO.shape == (5, outputs)
    assert torch.allclose(found_RO.double(), expected_RO, rtol=0, atol=2e-5)
    assert torch.equal(held.product(x_RI.view(1, 5, inputs)), found_RO.unsqueeze(0))


@each_kind
def test_weights_of_the_grid_are_kept_exactly(kind: Weights) -> None:
    """bfloat16 too, whose scales then are powers of two."""
    steps = torch.arange(-8, 8).repeat(32, 4)
    steps[:, 0] = -8 if kind == "int4" else -127
    weight_OI = steps * 0.25
    rows_II = torch.eye(64)
    for dtype in (torch.float32, torch.bfloat16):
        found_IO = quantized(weight_OI, kind, dtype).product(rows_II.to(dtype))
        assert torch.equal(found_IO.float(), weight_OI.t())


@each_kind
def test_weights_of_zero_stay_zero(kind: Weights) -> None:
    weight_OI = random(32, 64)
    weight_OI[3] = 0
    found_RO = quantized(weight_OI, kind, torch.bfloat16).product(random(4, 64).bfloat16())
    assert torch.equal(found_RO[:, 3], torch.zeros(4, dtype=torch.bfloat16))
    assert bool(found_RO.isfinite().all())


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.1), ("int4", 4.6)])
def test_bytes_that_a_token_reads(kind: Weights, bits: float) -> None:
    held = quantized(random(1024, 1024), kind, torch.bfloat16)
    assert 8 * held.num_bytes <= bits * 1024 * 1024


@each_dtype
@each_kind
def test_rows_and_threads_change_no_bit(kind: Weights, dtype: torch.dtype) -> None:
    held = quantized(random(208, 384), kind, dtype)
    x_RI = random(130, 384, seed=1).to(dtype)
    expected_RO = held.product(x_RI)
    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        for rows in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 65, 130):
            assert torch.equal(held.product(x_RI[:rows]), expected_RO[:rows])
            assert torch.equal(held.product(x_RI[-rows:]), expected_RO[-rows:])
    torch.set_num_threads(threads)


WAYS = [(kind, dtype, "switch") for kind in KINDS for dtype in (torch.float32, torch.bfloat16)]
WAYS += [("int8", torch.bfloat16, router) for router in ROUTERS if router != "switch"]


@pytest.fixture(params=WAYS, ids=str)
def model(request: pytest.FixtureRequest, make_model: Make) -> Iterator[LoadedModel]:
    """With experts."""
    kind, dtype, router = request.param
    plain = make_model(dtype, True, False, router)
    network = copy.deepcopy(plain.network)
    quantize(network, kind)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield LoadedModel(network, plain.tokenizer, {}, plain.path)
    torch.set_num_threads(before)


def test_alone_in_a_batch_and_in_chunks(model: LoadedModel) -> None:
    wanted = requests(model)
    alone = {r.request_id: run(model, EngineConfig(), r)[r.request_id] for r in wanted}
    together = EngineConfig(max_batch_size=16, token_budget=4096)
    assert run(model, together, *wanted) == alone
    few_slots = EngineConfig(max_batch_size=3, max_queue=64, token_budget=37)
    assert run(model, few_slots, *reversed(wanted)) == alone


def test_any_number_of_threads(model: LoadedModel) -> None:
    tokens_BT = make_tokens(model, 3, 100)
    logits = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        logits.append(model.logits(tokens_BT))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(("kind", "close"), [("int8", 0.05), ("int4", 0.5)])
def test_the_model_stays_near(make_model: Make, kind: Weights, close: float) -> None:
    """A dense one: with experts a token that changes its expert moves far."""
    plain = make_model(torch.float32, False, False)
    network = copy.deepcopy(plain.network)
    quantize(network, kind)
    tokens_BT = make_tokens(plain, 2, 60)
    expected = plain.logits(tokens_BT)
    found = LoadedModel(network, plain.tokenizer, {}, plain.path).logits(tokens_BT)
    spread = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    assert 0 < spread < close


@each_kind
def test_biases_stored_in_float32_are_those_of_few_rows_too(kind: Weights, tmp_path: Path) -> None:
    """Checkpoints of training hold float32."""
    model = open_model(small_model.write(tmp_path), dtype="bfloat16", weights=kind)
    tokens_BT = make_tokens(model, 1, 200)
    expected = model.logits(tokens_BT)
    assert bool(expected.isfinite().all())
    assert float(expected.std()) > 0.1
    assert torch.equal(model.logits(tokens_BT[:, :4]), expected[:, :4])


def test_plain_weights_are_given_up(make_model: Make) -> None:
    network = copy.deepcopy(make_model(torch.bfloat16, True, False).network)
    moe = network.layers[1].ffn
    assert isinstance(moe, MoE)
    plain = moe.experts
    quantize(network, "int8")
    assert isinstance(moe.experts, QuantizedExperts)
    assert moe.experts.count == 8
    assert not hasattr(plain, "up_weight")
    assert isinstance(network.layers[0].attention.qkv, QuantizedLinear)
    names = {name for name, _ in network.named_parameters()}
    left = ("norm", "bias", "embed", "router")
    assert all(any(part in name for part in left) for name in names)


def test_what_cannot_be_quantized_is_refused(make_model: Make) -> None:
    spec = make_model(torch.float32, True, False).spec
    check(spec, "int4", torch.float32, CPU)
    with pytest.raises(ConfigError, match=r'weights="int4" .* not in float64 on cpu here'):
        check(spec, "int4", torch.float64, CPU)
    odd = replace(spec, d_model=48, num_heads=3)
    with pytest.raises(ConfigError, match=r"widths that 32 divides, but model.d_model is 48"):
        check(odd, "int8", torch.float32, CPU)
    with pytest.raises(ConfigError, match="on cuda here"):
        check(spec, "int8", torch.bfloat16, torch.device("cuda"))
