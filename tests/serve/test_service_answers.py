"""What a Service answers beside new text: kept answers, scores, tokens."""

import threading
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from gptmoe.errors import AlreadyRunning, DeadlineExceeded, Overloaded
from gptmoe.generate.params import SamplingParams
from gptmoe.text import load_tokenizer
from serve.bridge import EngineThread
from serve.result_cache import ResultCache
from serve.scoring import ScoreCall
from serve.service import SCORES_AT_ONCE, Service
from serve.texts import Texts
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
        endless = replace(GREEDY, max_new_tokens=10**6)
        async with aclosing(service.stream(call(endless))) as deltas:
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


class Watched(Characters):
    """Notes in which threads it works."""

    def __init__(self) -> None:
        self.threads: dict[str, set[str]] = {"encode": set(), "decode": set()}

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        self.threads["encode"].add(threading.current_thread().name)
        return super().encode(text)

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        self.threads["decode"].add(threading.current_thread().name)
        return super().decode(token_ids)


def test_long_texts_leave_the_event_loop_free() -> None:
    """Encoding one, and decoding it: as a whole, and token by token."""
    here = threading.current_thread().name
    words = Watched()
    texts = Texts(words, max_seq_len=64)
    assert run(texts.tokenize("长短" * 50)) == ((ord("长"), ord("短")) * 50, ["长", "短"] * 50)
    assert words.threads == {"encode": {here}, "decode": {here}}
    words = Watched()
    texts = Texts(words, max_seq_len=64)
    assert run(texts.tokenize("长" * 3000)) == ((ord("长"),) * 3000, ["长"] * 3000)
    assert run(texts.detokenize((ord("长"),) * 3000)) == "长" * 3000
    assert here not in words.threads["encode"] | words.threads["decode"]


def test_what_tokenize_answers_detokenize_takes() -> None:
    """The longest text, of characters that are four tokens each."""
    texts = Texts(load_tokenizer(Path(__file__).parents[2] / "configs" / "corpus"), max_seq_len=8)
    text = "\U0001f9ff" * 512
    ids, tokens = run(texts.tokenize(text))
    assert len(ids) == len(tokens) >= len(text)
    assert run(texts.detokenize(ids)) == text
