"""What gRPC and HTTP have in common: claims, the header's moment, deadlines."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from gptmoe.errors import AlreadyRunning, DeadlineExceeded, NotFound, Overloaded, Unavailable
from gptmoe.generate.delta import Delta
from serve.bridge import EngineThread
from serve.names import Ticket
from serve.result_cache import ResultCache
from serve.scoring import ScoreCall
from serve.service import Service
from tests.characters import Characters

from .conftest import CARD
from .full_engine import FullEngine
from .told import ENDLESS, Told, call, complete, run


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


def test_an_id_of_the_servers_that_went_on_here_is_claimed(service: Service, names: Told) -> None:
    complete(service, call(request_id="fresh", ticket=Ticket("fresh", 1)))
    assert names.calls[0] == "claim fresh 0"


def test_who_resumes_a_text_has_no_right_to_an_id_that_runs(
    service: Service, names: Told, engine: FullEngine
) -> None:
    names.elsewhere.add("mine")
    with pytest.raises(AlreadyRunning):
        complete(service, call(named=True, resume_ids=(ord("一"),)))
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


@pytest.mark.parametrize("answer", ["cmpl-mine", "chatcmpl-mine"])
def test_an_answers_id_ends_its_request_unless_a_request_is_called_so(
    service: Service, names: Told, answer: str
) -> None:
    names.elsewhere |= {"mine", answer}
    run(service.abort(answer))
    assert names.calls[-1].startswith(f"abort {answer}")
    names.elsewhere.remove(answer)
    run(service.abort(answer))
    assert names.calls[-1].startswith("abort mine")
    names.elsewhere.clear()
    for nothing in (answer, "cmpl-", "chatcmpl", "text-mine"):
        with pytest.raises(NotFound):
            run(service.abort(nothing))


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
    assert run(service.texts.tokenize("春")) == ((ord("春"),), ["春"]), "that needs no engine"
    assert engine.seen == []


def test_what_was_running_elsewhere_goes_on_at_a_drained_service(service: Service) -> None:
    service.draining = True
    moved = call(ticket=Ticket("mine", 1), resume_ids=(ord("一"),))
    assert complete(service, moved).text == "二三"
    asked = ScoreCall(prompt="春", continuations=("风",), ticket=Ticket("mine", 1))
    assert len(run(service.score(asked))) == 1
    with pytest.raises(Unavailable, match="takes no new requests"):
        complete(service, call(ticket=Ticket("mine", 0)))


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
