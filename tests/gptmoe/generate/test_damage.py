"""Scores that are no numbers end their own request; nobody else notices."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gptmoe.errors import CheckpointError
from gptmoe.generate import executor
from gptmoe.generate.cache import KVCache
from gptmoe.generate.delta import Delta
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.plan import Span
from gptmoe.generate.request import Request
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.generate.slots import Copy
from gptmoe.loaded import LoadedModel
from gptmoe.model.spec import ModelSpec
from gptmoe.text import Tokenizer

from .conftest import Make
from .counting import FIRST, Counting, engine, request, run_out

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "answers": {"n": 3, "temperature": 1.0},
    "beams": {"num_beams": 3, "n": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_request_with_such_scores_ends(tokenizer: Tokenizer, kind: str) -> None:
    running = engine(tokenizer)
    assert isinstance(running.executor, Counting)
    running.executor.spoilt = FIRST + 1
    running.add(request("good", (FIRST + 10,)))
    sampling = {"logit_bias": ((FIRST + 1, 100.0),), **KINDS[kind]}
    running.add(request("bad", [FIRST] * 40, **sampling))
    prompt = tuple(range(FIRST, FIRST + 5))
    running.add(Request("scored", prompt, SamplingParams(), score_from=1, score_only=True))
    deltas = run_out(running)
    good = [token for delta in deltas if delta.request_id == "good" for token in delta.token_ids]
    assert good == [FIRST + 11, FIRST + 12, FIRST + 13]
    for name, answers in (("bad", sampling.get("n", 1)), ("scored", 1)):
        last = [delta for delta in deltas if delta.request_id == name and delta.finish_reason]
        assert [delta.index for delta in last] == list(range(answers))
        assert last[0].finish_reason == "error"
        assert all(isinstance(delta.error, CheckpointError) for delta in last)
        assert "must be finite; found nan" in str(last[0].error)
    assert running.stats.kv_used_blocks == 0
    running.add(request("again", [FIRST] * 40, max_new_tokens=1))
    assert [delta.cached_tokens for delta in run_out(running)] == [0]  # nothing of it is kept


CASES: dict[str, tuple[Any, ...]] = {  # dtype, has experts, packed, router
    "float32": (torch.float32, True, False),
    "float32-packed": (torch.float32, True, True),
    "float32-expert_choice": (torch.float32, True, False, "expert_choice"),
    "float32-loss_free": (torch.float32, True, False, "loss_free"),
    "float32-top2": (torch.float32, True, False, "top2"),
    "bfloat16-packed": (torch.bfloat16, True, True),
    "bfloat16-without-kernels": (torch.bfloat16, True, True),
}


@pytest.fixture
def damaged(
    request: pytest.FixtureRequest, make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[LoadedModel, int]]:
    """A model that makes no numbers of one token, beyond the tokenizer's so nobody else says it."""
    if request.param == "bfloat16-without-kernels":
        monkeypatch.setattr(executor, "row_kernels", lambda cache: None)
    model = make_model(*CASES[request.param])
    bad = model.tokenizer.vocab_size + 5
    weight_VD = model.network.embed.tokens.weight
    before_D = weight_VD[bad].clone()
    weight_VD[bad] = torch.nan
    yield model, bad
    weight_VD[bad] = before_D


Told = list[tuple[tuple[int, ...], tuple[float, ...], str]]


def told(deltas: list[Delta], name: str) -> Told:
    """Tokens, their log-probabilities and the finish reason of each delta of a request."""
    mine = [delta for delta in deltas if delta.request_id == name]
    return [(delta.token_ids, delta.logprobs, delta.finish_reason) for delta in mine]


def run_all(model: LoadedModel, slots: int, *requests: Request) -> list[Told]:
    """What each is told by an engine with so many slots."""
    running = model.engine(EngineConfig(max_batch_size=slots, token_budget=48))
    for one in requests:
        running.add(one)
    deltas = run_out(running)
    assert running.stats.kv_used_blocks == 0
    return [told(deltas, one.request_id) for one in requests]


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("damaged", CASES, indirect=True)
def test_neighbours_and_heirs_of_its_slot_say_what_they_say_alone(
    damaged: tuple[LoadedModel, int], slots: int
) -> None:
    model, bad = damaged
    sampling = SamplingParams(max_new_tokens=9, ignore_end=True, logprobs=True, seed=3)
    good = [Request(f"good {i}", (FIRST + i,) * (30 * i + 1), sampling) for i in range(5)]
    alone = [run_all(model, 1, one)[0] for one in good]
    wrong = [
        Request(f"bad {place}", (FIRST,) * place + (bad,) + (FIRST,) * (150 - place), sampling)
        for place in (0, 70, 150)
    ]
    mixed = [wrong[0], good[0], good[1], wrong[1], good[2], wrong[2], good[3], good[4]]
    said = run_all(model, slots, *mixed)
    assert [said[mixed.index(one)] for one in good] == alone
    assert [said[mixed.index(one)] for one in wrong] == [[((), (), "error")]] * 3


@pytest.mark.parametrize("damaged", ["float32", "bfloat16-packed"], indirect=True)
def test_who_comes_after_a_prompt_that_was_left_halfway(damaged: tuple[LoadedModel, int]) -> None:
    model, bad = damaged
    sampling = SamplingParams(max_new_tokens=9, ignore_end=True, seed=3)
    good = Request("good", (FIRST,) * 20, sampling)
    alone = run_all(model, 1, good)
    running = model.engine(EngineConfig(max_batch_size=1, token_budget=48))
    running.add(Request("bad", (bad,) * 200, sampling))
    assert running.step() == []
    running.abort("bad")
    running.add(good)
    assert [told(run_out(running), "good")] == alone


@pytest.mark.parametrize("damaged", ["float32"], indirect=True)
def test_a_caller_in_this_process_gets_the_error(
    damaged: tuple[LoadedModel, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bad = damaged
    monkeypatch.setattr(model.tokenizer, "encode", lambda text: [bad])
    monkeypatch.setattr("gptmoe.generate.request._check_tokens", lambda *_: None)
    with pytest.raises(CheckpointError, match="must be finite; found nan"):
        model.generate(["春风", "明月"])
    with pytest.raises(CheckpointError, match="must be finite; found nan"):
        list(model.stream("春风"))


def test_a_slot_holds_zeros_behind_its_sequence() -> None:
    spec = ModelSpec(
        num_layers=2, d_model=24, num_heads=3, d_ff=8, vocab_size=10, max_seq_len=300
    )  # fmt: skip
    cache = KVCache(spec, 3, torch.float32, torch.device("cpu"))
    cache.reserve(300)

    def begin(slot: int, start: int, count: int) -> None:
        cache.begin([Span("", slot, start, count, 0)])
        for segment in cache.segments:
            end = max(0, min(segment.size, start + count - segment.first))
            for kept in (segment.keys, segment.values):
                kept[:, slot, :, max(0, start - segment.first) : end] = slot + 1

    def ends(slot: int) -> list[int]:
        """How many positions hold something, in all layers and heads, by segment."""
        held = [(s.keys[:, slot] != 0) & (s.values[:, slot] != 0) for s in cache.segments]
        counts = [int(one.sum()) / (2 * 3 * 8) for one in held]
        return [int(count) for count in counts]

    begin(1, 0, 200)
    begin(1, 200, 90)
    begin(2, 0, 20)
    assert (ends(1), ends(2)) == ([128, 128, 34], [20, 0, 0])
    begin(1, 140, 1)  # another one, that goes on behind the first 140
    assert (ends(1), ends(2)) == ([128, 13, 0], [20, 0, 0])
    cache.copy([Copy(1, 2, 135)])
    assert ends(2) == [128, 7, 0]
    begin(2, 64, 10)
    assert ends(2) == [74, 0, 0]
