"""Ours for the decode benches: models of the shared shape with random weights, and their steps."""

import math
import time
import zlib
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from gptmoe.generate.engine import Engine
from gptmoe.generate.packed import pack
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.quantized import QuantizedLinear, Weights, quantize
from gptmoe.generate.request import Request
from gptmoe.loaded import LoadedModel
from gptmoe.model.counts import parameters
from gptmoe.model.layers import Linear
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT
from gptmoe.stored import KEPT_WIDE
from gptmoe.text import Tokenizer
from tests.bench.peers import shape

WEIGHT_BITS = {"": 16, "int8": 8, "int4": 4.25}
"""int4: with 16 bits of scale for 64 weights."""

POOL = 10_000_019
"""Random numbers that are drawn; a prime, so that no two rows of a weight are equal."""


class Letters:
    """A tokenizer in name: every token is one letter."""

    kind, digest = "letters", ""
    vocab_size = shape.VOCABULARY
    end_id = sep_id = shape.VOCABULARY - 1

    def token_bytes(self, token_id: int) -> bytes:
        return b"abcdefghijklmnopqrstuvwxyz"[token_id % 26 :][:1]

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        raise NotImplementedError

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        raise NotImplementedError

    def characters_per_token(self) -> list[int]:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def spec_with(experts: int) -> ModelSpec:
    """The shape, dense (0) or with so many experts on every second layer."""
    return ModelSpec(
        num_layers=shape.LAYERS,
        d_model=shape.D_MODEL,
        num_heads=shape.HEADS,
        d_ff=shape.D_FF,
        vocab_size=shape.VOCABULARY,
        max_seq_len=shape.CONTEXT,
        num_experts=(experts,) * (shape.LAYERS // 2) if experts else (),
        init_std=0.02,
    )


def model(experts: int, weights: Weights = "", *, map_experts: bool = False) -> LoadedModel:
    """Ours in bf16; with `map_experts` these stay in the layout of the file."""
    spec = spec_with(experts)
    return loaded(spec, random_state(spec), torch.bfloat16, weights, map_experts=map_experts)


def random_state(spec: ModelSpec) -> dict[str, Tensor]:
    """N(0, 0.02) in bf16, norms at one, biases at zero: quickly, also for billions."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in GPT(spec).named_parameters()}
    return {name: random_values(name, size) for name, size in shapes.items()}


def random_values(name: str, size: Sequence[int]) -> Tensor:
    """One parameter of such a model. Billions of numbers are drawn as few, again and again, from
    another one on for each parameter."""
    if name.endswith("bias"):
        return torch.zeros(*size, dtype=torch.bfloat16)
    if "norm" in name:
        return torch.ones(*size, dtype=torch.bfloat16)
    pool = _pool().roll(zlib.crc32(name.encode()) % POOL)
    values = torch.empty(math.prod(size), dtype=torch.bfloat16)
    for part in values.split(POOL):
        part.copy_(pool[: len(part)])
    return values.view(*size)


@cache
def _pool() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(POOL, generator=generator).mul_(0.02).bfloat16()


def loaded(
    spec: ModelSpec,
    state: dict[str, Tensor],
    dtype: torch.dtype,
    weights: Weights = "",
    *,
    map_experts: bool = False,
) -> LoadedModel:
    """Ours with these weights, as `gptmoe.load` would make it."""
    with torch.device("meta"):
        network = GPT(spec, compute_dtype=dtype)
    wide = {name: any(part in name for part in KEPT_WIDE) for name in state}
    kept = {n: w.to(torch.float32 if wide[n] else dtype).contiguous() for n, w in state.items()}
    network.load_state_dict(kept, assign=True)
    network.requires_grad_(False)
    if weights:
        quantize(network, weights)
    else:
        assert pack(network, experts=not map_experts), "this machine has no packed products"
    tokenizer: Tokenizer = Letters()
    return LoadedModel(network.eval(), tokenizer, {}, Path())


def tokens(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Continue all prompts greedily."""
    return _run(engine, prompts)[0]


def step_s(engine: Engine, batch: int) -> float:
    """Seconds of one decoding step, once all prompts have their first token."""
    return _run(engine, shape.prompts(batch))[1] / shape.STEPS


def linear_s(network: GPT) -> float:
    """Seconds of the linear layers of one step at batch 1 alone, head included; a dense model."""
    rows = 4 if network.fixed_rows else 1
    thin_RD, wide_RF = (
        torch.ones(rows, size, dtype=network.compute_dtype) for size in (shape.D_MODEL, shape.D_FF)
    )
    products = [partial(network.logits, thin_RD)]
    for name, layer in network.named_modules():
        if isinstance(layer, Linear | QuantizedLinear):
            products.append(partial(layer, wide_RF if name.endswith("ffn.down") else thin_RD))
    with torch.inference_mode():
        began_s = time.perf_counter()
        for _ in range(shape.STEPS):
            for product in products:
                product()
        return (time.perf_counter() - began_s) / shape.STEPS


def active_bytes(spec: ModelSpec, weights: Weights = "") -> float:
    """Weights that a token reads: of each MoE layer one expert; of the positions one row."""
    active = parameters(spec).active - spec.max_seq_len * spec.d_model
    return active * WEIGHT_BITS[weights] / 8


def _run(engine: Engine, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], float]:
    sampling = SamplingParams(temperature=0, max_new_tokens=shape.NEW, ignore_end=True)
    found: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    for index, prompt in enumerate(prompts):
        engine.add(Request(str(index), tuple(prompt), sampling))
    began_s = 0.0
    while engine.has_work:
        if not began_s and all(found.values()):
            began_s = time.perf_counter()
        for delta in engine.step():
            found[delta.request_id] += delta.token_ids
    return list(found.values()), time.perf_counter() - began_s
