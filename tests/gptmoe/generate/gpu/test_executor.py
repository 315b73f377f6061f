"""The paged executor says what the one for CPUs says, however its steps are run; in float32."""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from gptmoe.errors import ConfigError
from gptmoe.generate import gpu
from gptmoe.generate.engine import Engine
from gptmoe.generate.executor import LocalExecutor, WholeModel
from gptmoe.generate.gpu import graphs, products
from gptmoe.generate.gpu.cache import PagedCache
from gptmoe.generate.gpu.executor import PagedExecutor
from gptmoe.generate.gpu.graphs import decode, sizes
from gptmoe.generate.gpu.products import can_be_captured
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.plan import Span
from gptmoe.generate.request import Request
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.generate.slots import blocks_of
from gptmoe.model.dispatch import LocalDispatcher
from gptmoe.model.initialize import initialize
from gptmoe.model.moe import MoE
from gptmoe.model.spec import ModelSpec, RouterKind, RouterSpec
from gptmoe.model.transformer import GPT
from gptmoe.text import Tokenizer
from tests.small_model import draw_biases, settle

CONTEXT = 64
CONFIG = EngineConfig(max_batch_size=5, token_budget=24, kv_tokens=112)
PROMPT = tuple(range(10, 43))
REQUESTS = (
    Request("greedy", PROMPT, SamplingParams(max_new_tokens=6, temperature=0, ignore_end=True)),
    Request("two", (*PROMPT[:20], 7), SamplingParams(max_new_tokens=4, n=2, seed=5)),
    Request("beams", PROMPT[:18], SamplingParams(max_new_tokens=4, num_beams=2, temperature=0)),
    Request("scored", PROMPT[:9], SamplingParams(max_new_tokens=1, seed=2), score_from=1),
)


pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: Triton compiles (tests/gpu)"
)


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes milliseconds a program, however much one does."""
    monkeypatch.setattr(products, "TILE_OUTPUTS", 4096)


def network_spec(kind: RouterKind = "switch", **changes: Any) -> ModelSpec:
    return ModelSpec(
        num_layers=2,
        d_model=32,
        num_heads=1,
        d_ff=64,
        vocab_size=3000,
        max_seq_len=CONTEXT,
        num_experts=(4,),
        init_std=0.3,
        router=RouterSpec(kind=kind),
        **changes,
    )


def network(kind: RouterKind = "switch", **changes: Any) -> GPT:
    made = GPT(network_spec(kind, **changes))
    initialize(made, seed=3)
    draw_biases(made)
    settle(made)
    return made.requires_grad_(False).eval()


class StandIn:
    """A CUDA graph that computes its step again when it is replayed."""

    step: Any = None

    def replay(self) -> None:
        arguments, logits_RV = self.step
        logits_RV.copy_(decode(*arguments))


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device here captures anything; all else of DecodingGraphs is as it is."""
    capturing: list[StandIn] = []

    @contextmanager
    def graph(made: StandIn, **_: Any) -> Iterator[None]:
        capturing.append(made)
        yield
        capturing.clear()

    dispatch = LocalDispatcher.dispatch

    def waits(*arguments: Any) -> Any:
        assert not capturing, "it asks the device how many rows there are"
        return dispatch(*arguments)

    def noted(*arguments: Any) -> torch.Tensor:
        logits_RV = decode(*arguments)
        for made in capturing:
            made.step = arguments, logits_RV
        return logits_RV

    monkeypatch.setattr(LocalDispatcher, "dispatch", waits)

    monkeypatch.setattr(graphs, "decode", noted)
    monkeypatch.setattr(graphs, "sizes", lambda most: [2, most + 1])  # some with padding
    for name in ("graph_pool_handle", "Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", graph)


def paged(model: GPT, *, invariant: bool = False, captured: bool = False) -> PagedExecutor:
    executors = gpu.executors(model, invariant=invariant)
    made = executors(model, CONFIG.max_batch_size, CONFIG.blocks(CONTEXT))
    assert isinstance(made, PagedExecutor)
    if captured:
        assert can_be_captured(model)
        made._graphs.add(0, graphs.DecodingGraphs(model, made.cache, CONFIG.max_batch_size))
    return made


def answers(executor: WholeModel, tokenizer: Tokenizer) -> tuple[dict[Any, list[int]], list[float]]:
    """Tokens by request and answer, and the scores of a prompt; two requests come late."""
    engine = Engine(executor, tokenizer, CONTEXT, CONFIG)
    found, scores = defaultdict[Any, list[int]](list), []
    later = list(REQUESTS)
    while later or engine.has_work:
        if later:
            engine.add(later.pop(0))
        for delta in engine.step():
            found[delta.request_id, delta.index] += delta.token_ids
            scores += [score.logprob for score in delta.prompt_scores or ()]
    assert engine.stats.preemptions or engine.stats.prefix_hits
    return found, scores


@pytest.mark.parametrize(
    ("invariant", "kind", "changes"),
    [(False, "switch", {}), (True, "top2", {"residual_moe": True})],
)
@pytest.mark.usefixtures("stand_ins")
def test_the_same_texts(
    tokenizer: Tokenizer, invariant: bool, kind: RouterKind, changes: Any
) -> None:
    model = network(kind, **changes)
    expected, expected_scores = answers(LocalExecutor(model, CONFIG.max_batch_size), tokenizer)
    executor = paged(deepcopy(model), invariant=invariant, captured=True)
    found, scores = answers(executor, tokenizer)
    assert found == expected
    assert scores == pytest.approx(expected_scores, abs=1e-4)


def test_experts_that_choose_run_uncaptured(tokenizer: Tokenizer) -> None:
    model = network("expert_choice")
    expected, _ = answers(LocalExecutor(model, CONFIG.max_batch_size), tokenizer)
    copied = deepcopy(model)
    assert answers(paged(copied), tokenizer)[0] == expected
    assert not can_be_captured(copied)
    with pytest.raises(ConfigError, match="invariant=true is for routers that send each token to"):
        gpu.executors(model, invariant=True)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("most_rows", [0, 64])
def test_rows_of_experts_are_counted_without_padding(
    monkeypatch: pytest.MonkeyPatch, most_rows: int
) -> None:
    monkeypatch.setattr(products, "MOST_ROWS", most_rows)
    model = network()
    executor = paged(model, captured=True)
    moe = next(module for module in model.modules() if isinstance(module, MoE))
    read = moe.count_rows()
    token_ids = {"a": list(PROMPT), "b": list(PROMPT)}
    executor.hidden([Span("a", 0, 0, 6, 1), Span("b", 1, 0, 5, 1)], 0, token_ids)
    assert sum(read()) == 11
    rows = torch.tensor([[3, 4, 5], [6, 5, 0], [0, 1, 2]])
    executor.cache.begin(
        (), (), [Span(k, s, p, 1, 1) for k, s, p in zip("abc", (0, 1, 2), (6, 5, 0), strict=True)]
    )
    executor._graphs.held[0].run(rows)
    assert sum(read()) == 14


def test_weights_of_another_version(tokenizer: Tokenizer) -> None:
    model, other = network(), network()
    initialize(other, seed=9)
    executor = paged(model)
    products.prepare(other)
    executor.add(1, other)
    engine = Engine(executor, tokenizer, CONTEXT, CONFIG)
    engine.refresh(1)
    assert list(executor.held()) == [1]
    executor.add(3, other)
    executor.keep({1, 2})
    assert list(executor.held()) == [1, 3], "newer ones are not asked for yet"
    found = answers_of(engine, REQUESTS[0])
    plain = network()
    initialize(plain, seed=9)
    assert found == answers_of(
        Engine(LocalExecutor(plain, 5), tokenizer, CONTEXT, CONFIG), REQUESTS[0]
    )


def answers_of(engine: Engine, request: Request) -> list[int]:
    engine.add(request)
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for delta in engine.step() for token in delta.token_ids]
    return tokens


def test_a_page_is_16_tokens_of_each_slot_and_padding_has_one() -> None:
    cache = PagedCache(network_spec(), 3, 7, torch.float32, torch.device("cpu"))
    assert cache.keys.shape == (2, 1 + 7 + 3, 1, 16, 32)
    assert cache.table_SX.shape == (4, blocks_of(CONTEXT))
    assert not cache.table_SX.any()


def test_a_cache_that_does_not_fit_is_said_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", full)
    sentence = (
        r"^a KV cache of 112 tokens \(0\.0 GB\) did not fit into what is left .* of cpu; lower"
    )
    with pytest.raises(ConfigError, match=sentence):
        PagedCache(network_spec(), 3, 7, torch.float32, torch.device("cpu"))


def test_sizes_of_graphs() -> None:
    assert sizes(1) == [1]
    assert sizes(5) == [1, 2, 3, 4, 5]
    assert sizes(8) == list(range(1, 9))
    assert sizes(20) == [*range(1, 9), 16, 24]


def test_without_triton_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr("gptmoe.generate.gpu.importlib.import_module", missing)
    with pytest.raises(ConfigError, match="device=cuda wants Triton, which comes with torch for"):
        gpu.executors(network())
