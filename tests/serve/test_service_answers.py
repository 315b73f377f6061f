"""What a Service answers beside new text: kept answers, scores, tokens."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from gptmoe.errors import AlreadyRunning, DeadlineExceeded, Overloaded
from gptmoe.generate.params import SamplingParams
from serve.bridge import EngineThread
from serve.result_cache import ResultCache
from serve.scoring import ScoreCall
from serve.service import SCORES_AT_ONCE, Service
from tests.characters import Characters

from .conftest import CARD
from .full_engine import FullEngine
from .told import GREEDY, SEEDED, Told, call, complete, run


@pytest.fixture
def engine() -> FullEngine:
    return FullEngine()


@pytest.fixture
def names(engine: FullEngine) -> Told:
    return Told(engine)


@pytest.fixture
def results() -> ResultCache:
    return ResultCache(100_000)


@pytest.fixture
def service(bridge: EngineThread, names: Told, results: ResultCache) -> Service:
    return Service(bridge, Characters(), CARD, names=names, results=results)


# --- kept answers ----------------------------------------------------------------------------


@pytest.mark.parametrize(("sampling", "seeded"), [(GREEDY, False), (SEEDED, True)])
def test_an_answer_that_is_fixed_is_kept(
    service: Service, engine: FullEngine, names: Told, sampling: SamplingParams, seeded: bool
) -> None:
    first = complete(service, call(sampling, seeded=seeded))
    again = complete(service, call(sampling, "other", seeded=seeded, named=True))
    assert len(engine.seen) == 1
    assert again.choices == first.choices
    assert again.request_id == "other"
    assert again.cached_tokens == again.prompt_tokens == 2
    assert names.calls[-2:] == ["claim other 1", "release other 1"], "as any other request"
    names.elsewhere.add("mine")
    with pytest.raises(AlreadyRunning):
        complete(service, call(sampling, seeded=seeded, named=True))


def test_an_answer_by_chance_is_not_kept(service: Service, engine: FullEngine) -> None:
    for _ in range(2):
        complete(service, call(SEEDED, seeded=False))
    assert len(engine.seen) == 2


def test_answers_of_other_weights_are_not_found(service: Service, engine: FullEngine) -> None:
    complete(service, call(GREEDY))
    service.version = 1
    complete(service, call(GREEDY))  # by weights of version 0 still: not kept either
    engine.version = 1
    complete(service, call(GREEDY))
    assert len(engine.seen) == 3
    complete(service, call(GREEDY))
    assert len(engine.seen) == 3


def test_an_answer_that_was_left_is_not_kept(service: Service, results: ResultCache) -> None:
    async def leave() -> None:
        async with aclosing(service.stream(call(replace(GREEDY, max_new_tokens=10**9)))) as deltas:
            await anext(deltas)

    run(leave())
    assert results.used_bytes == 0


def test_nothing_is_kept_unless_asked_for(bridge: EngineThread, engine: FullEngine) -> None:
    service = Service(bridge, Characters(), CARD)
    for _ in range(2):
        complete(service, call(GREEDY))
    assert len(engine.seen) == 2


# --- scores ----------------------------------------------------------------------------------


def test_each_continuation_is_a_request_behind_the_same_prompt(
    service: Service, engine: FullEngine
) -> None:
    texts = ("又绿", "的")
    scores = run(service.score(ScoreCall(prompt="春风", continuations=texts, priority=3)))
    assert [score.token_ids for score in scores] == [tuple(map(ord, text)) for text in texts]
    assert [score.greedy for score in scores] == [False, True]
    assert [score.logprob for score in scores] == [-2.5, -1.0]
    for request in engine.seen:
        assert request.prompt_ids[:2] == tuple(map(ord, "春风"))
        assert (request.score_from, request.score_only, request.priority) == (2, True, 3)


def test_many_continuations_do_not_fill_the_queue(service: Service, engine: FullEngine) -> None:
    engine.capacity = SCORES_AT_ONCE
    texts = tuple(f"第{number}句" for number in range(64))
    assert len(run(service.score(ScoreCall(prompt="春风", continuations=texts)))) == 64


def test_a_refused_score_is_one_plain_error(service: Service, engine: FullEngine) -> None:
    asked = ScoreCall(prompt="春风", continuations=("又", "绿", "江"))
    engine.capacity = 0
    with pytest.raises(Overloaded, match="the queue is full"):
        run(service.score(asked))
    engine.capacity = 8
    with pytest.raises(DeadlineExceeded, match="has passed before all was scored"):
        run(service.score(replace(asked, deadline_s=1e-9)))
    assert not engine.has_work


# --- texts -----------------------------------------------------------------------------------


def test_long_texts_leave_the_event_loop_free(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    to_thread: Callable[..., Any] = asyncio.to_thread

    async def remembered(method: Any, *given: Any) -> Any:
        threads.append(method.__name__)
        return await to_thread(method, *given)

    monkeypatch.setattr(asyncio, "to_thread", remembered)
    run(service.texts.tokenize("长" * 100))
    assert threads == []
    assert run(service.texts.tokenize("长" * 3000)) == (ord("长"),) * 3000
    assert run(service.texts.detokenize((ord("长"),) * 3000)) == "长" * 3000
    assert threads == ["encode", "decode"]
