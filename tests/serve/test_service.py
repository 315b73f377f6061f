"""What gRPC and HTTP have in common: claims, the header's moment, kept answers, scores."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from gptmoe.errors import AlreadyRunning, DeadlineExceeded, NotFound, Overloaded, Unavailable
from gptmoe.generate.delta import Delta
from gptmoe.generate.params import SamplingParams
from serve.bridge import EngineThread
from serve.completion import Completion
from serve.result_cache import ResultCache
from serve.scoring import ScoreCall
from serve.service import SCORES_AT_ONCE, Call, Service
from tests.characters import Characters

from .conftest import CARD
from .full_engine import FullEngine

GREEDY = SamplingParams(temperature=0, max_new_tokens=3)
SEEDED = SamplingParams(seed=7, max_new_tokens=3)
ENDLESS = SamplingParams(max_new_tokens=10**9)


class Told:
    """Names that remember what they were told; `engine` shows what was admitted by then."""

    def __init__(self, engine: FullEngine) -> None:
        self.engine = engine
        self.calls: list[str] = []
        self.taken: set[str] = set()
        self.elsewhere: set[str] = set()

    def _say(self, what: str, request_id: str) -> None:
        self.calls.append(f"{what} {request_id} {len(self.engine.seen)}")

    async def claim(self, request_id: str) -> None:
        if request_id in self.taken | self.elsewhere:
            raise AlreadyRunning(f"request_id {request_id!r} is running")
        self._say("claim", request_id)
        self.taken.add(request_id)

    def note(self, request_id: str) -> None:
        self._say("note", request_id)
        self.taken.add(request_id)

    async def release(self, request_id: str) -> None:
        await asyncio.sleep(0.01)
        self._say("release", request_id)
        self.taken.discard(request_id)

    def let_go(self, request_id: str) -> None:
        if request_id in self.taken:
            self._say("let_go", request_id)
            self.taken.discard(request_id)

    async def abort(self, request_id: str) -> None:
        if request_id not in self.elsewhere:
            raise NotFound(f"no request {request_id!r}")
        self._say("abort", request_id)


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


def run(task: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(20):
            return await task

    return asyncio.run(bounded())


def call(sampling: SamplingParams = SEEDED, request_id: str = "mine", **given: Any) -> Call:
    return Call(prompt="春风", sampling=sampling, request_id=request_id, **given)


def complete(service: Service, asked: Call) -> Completion:
    done: Completion = run(service.complete(asked))
    return done


# --- who runs what ---------------------------------------------------------------------------


def test_an_id_is_claimed_before_the_engine_has_it_and_free_with_the_last_delta(
    service: Service, names: Told
) -> None:
    async def stream() -> None:
        async for delta in service.stream(call(named=True)):
            assert ("mine" in names.taken) == (not delta.finish_reason)

    run(stream())
    assert names.calls == ["claim mine 0", "release mine 1"]


def test_an_id_of_the_servers_is_noted_without_waiting(service: Service, names: Told) -> None:
    complete(service, call(request_id="fresh"))
    assert names.calls == ["note fresh 0", "let_go fresh 1"]


def test_an_id_that_runs_elsewhere_is_refused_and_stays(
    service: Service, names: Told, engine: FullEngine
) -> None:
    names.elsewhere.add("mine")
    with pytest.raises(AlreadyRunning):
        complete(service, call(named=True))
    assert (engine.seen, names.calls) == ([], [])


def test_leaving_and_refusals_let_the_id_go(
    service: Service, names: Told, engine: FullEngine
) -> None:
    async def leave() -> None:
        async with aclosing(service.stream(call(ENDLESS, named=True))) as deltas:
            await anext(deltas)

    run(leave())
    assert names.taken == set()
    engine.capacity = 0
    with pytest.raises(Overloaded):
        complete(service, call(named=True))
    assert names.taken == set()


def test_an_abort_goes_to_this_engine_first_and_then_elsewhere(
    service: Service, names: Told, engine: FullEngine
) -> None:
    async def abort() -> list[Delta]:
        deltas = []
        async for delta in service.stream(call(ENDLESS, named=True)):
            if not deltas:
                await service.abort("mine")
            deltas.append(delta)
        return deltas

    assert run(abort())[-1].finish_reason == "abort"
    assert "abort mine" not in " ".join(names.calls)
    names.elsewhere.add("other")
    run(service.abort("other"))
    assert names.calls[-1].startswith("abort other")
    with pytest.raises(NotFound, match="no request 'nobody'"):
        run(service.abort("nobody"))


def test_a_retry_with_the_same_seed_has_the_same_text(service: Service) -> None:
    first = complete(service, call(named=True))
    again = complete(service, call(named=True))
    assert (again.text, again.token_ids) == (first.text, first.token_ids)


# --- the header's moment ---------------------------------------------------------------------


def test_a_refusal_never_comes_behind_a_header(service: Service, engine: FullEngine) -> None:
    async def ask(number: int) -> bool:
        opened = False
        try:
            async with service.opened(call(request_id=str(number))) as running:
                opened = True
                return bool([delta async for delta in running.deltas])
        except Overloaded:
            assert not opened, "who was refused had its header already"
            return False

    async def crowd() -> list[bool]:
        return await asyncio.gather(*map(ask, range(200)))

    answered = run(crowd())
    assert 0 < sum(answered) < 200


def test_a_call_is_open_before_the_engine_computes(service: Service, engine: FullEngine) -> None:
    """The step that is under way ends first; the next one may be long."""

    async def open_it() -> int:
        engine.gate.clear()
        other = asyncio.create_task(service.complete(call(request_id="other")))
        await asyncio.to_thread(engine.in_step.wait, 5)
        opening = asyncio.create_task(begin())
        await asyncio.sleep(0.05)
        assert not opening.done(), "the engine has not said yes"
        engine.gate.set()
        await other
        return await opening

    async def begin() -> int:
        async with service.opened(call()) as running:
            assert [delta async for delta in running.deltas][-1].finish_reason == "length"
            return len(running.request.prompt_ids)

    assert run(open_it()) == 2


@pytest.mark.parametrize("patience_s", [0.0, 0.001, 0.01, 0.05])
def test_leaving_while_the_engine_decides_leaves_nothing(
    service: Service, engine: FullEngine, names: Told, wait_until: Any, patience_s: float
) -> None:
    async def leave() -> None:
        engine.gate.clear()
        other = asyncio.create_task(service.complete(call(request_id="other")))
        await asyncio.to_thread(engine.in_step.wait, 5)
        task = asyncio.create_task(service.complete(call(ENDLESS, named=True)))
        await asyncio.sleep(patience_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.gate.set()
        await other

    run(leave())
    wait_until(lambda: not engine.has_work)
    assert names.taken == set()


def test_a_drained_service_refuses(service: Service, engine: FullEngine) -> None:
    service.draining = True
    with pytest.raises(Unavailable, match="poems takes no new requests: an operator drains it"):
        complete(service, call())
    with pytest.raises(Unavailable):
        run(service.score(ScoreCall(prompt="春", continuations=("风",))))
    assert run(service.texts.tokenize("春")) == (ord("春"),), "that needs no engine"
    assert engine.seen == []


# --- deadlines -------------------------------------------------------------------------------


def test_what_came_before_the_deadline_is_delivered(service: Service) -> None:
    async def stream() -> tuple[list[Delta], str]:
        deltas = []
        try:
            async for delta in service.stream(call(ENDLESS, deadline_s=0.05)):
                deltas.append(delta)
        except DeadlineExceeded as error:
            return deltas, str(error)
        return deltas, ""

    deltas, sentence = run(stream())
    tokens = sum(len(delta.token_ids) for delta in deltas)
    assert sentence == (
        f"the deadline of 0.05 s has passed after {tokens} tokens were generated; "
        "ask for fewer, or give more time"
    )
    assert not any(delta.finish_reason for delta in deltas)


def test_a_deadline_that_has_passed_is_refused(service: Service, engine: FullEngine) -> None:
    with pytest.raises(DeadlineExceeded, match="passed before the request arrived"):
        complete(service, call(deadline_s=-1.0))
    assert engine.seen == []


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
        async with aclosing(service.stream(call(GREEDY))) as deltas:
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
