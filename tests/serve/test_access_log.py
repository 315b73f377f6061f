"""The line about each call."""

import asyncio
import json
import logging
from typing import Any

import pytest

from gptmoe.errors import Overloaded, RequestError
from gptmoe.generate.delta import Delta, Timings
from gptmoe.generate.params import SamplingParams
from serve import access_log
from serve.access_log import Entry, LogConfig, LoggedService
from serve.bridge import EngineThread
from serve.service import Call, ModelCard, Service
from tests.characters import Characters


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The lines so far, parsed."""
    monkeypatch.setattr(access_log.log, "propagate", True)
    caplog.set_level(logging.INFO, "serve.access_log")
    return lambda: [json.loads(record.getMessage()) for record in caplog.records]


def made(bridge: EngineThread, card: ModelCard, **settings: bool) -> LoggedService:
    return LoggedService(bridge, Characters(), card, config=LogConfig(**settings))


@pytest.fixture
def card(service: Service) -> ModelCard:
    return service.card


def call(tokens: int = 3, **more: Any) -> Call:
    sampling = SamplingParams(max_new_tokens=tokens)
    return Call(prompt="春风", sampling=sampling, request_id="r-1", transport="grpc", **more)


def test_a_call_is_one_line(bridge: EngineThread, card: ModelCard, lines: Any) -> None:
    asyncio.run(made(bridge, card).complete(call()))
    (line,) = lines()
    assert line.pop("time").endswith("+00:00")
    assert 0 <= line.pop("first_token_s") <= line.pop("total_s") < 60
    assert line == {
        "request_id": "r-1",
        "model": "poems",
        "transport": "grpc",
        "status": "ok",
        "field": "",
        "finish_reason": "length",
        "prompt_tokens": 2,
        "cached_tokens": 0,
        "completion_tokens": 3,
        "queue_s": None,
    }


def test_no_prompt_unless_asked_for(bridge: EngineThread, card: ModelCard, lines: Any) -> None:
    asyncio.run(made(bridge, card).complete(call()))
    asyncio.run(made(bridge, card, prompts=True).complete(call()))
    without, with_it = lines()
    assert "春风" not in json.dumps(without, ensure_ascii=False)
    assert with_it["prompt"] == "春风"


def test_a_refused_call_names_the_field_not_the_words(
    bridge: EngineThread, card: ModelCard, lines: Any
) -> None:
    secret = Call(prompt="秘" * 1000)
    with pytest.raises(RequestError):
        asyncio.run(made(bridge, card).complete(secret))
    (line,) = lines()
    assert (line["status"], line["field"]) == ("RequestError", "prompt")
    assert "秘" not in json.dumps(line, ensure_ascii=False)
    assert line["first_token_s"] is None


def test_a_full_queue(bridge: EngineThread, card: ModelCard, engine: Any, lines: Any) -> None:
    engine.capacity = 0
    with pytest.raises(Overloaded):
        asyncio.run(made(bridge, card).complete(call()))
    assert lines()[0]["status"] == "Overloaded"


def test_a_bug_of_ours(bridge: EngineThread, card: ModelCard, lines: Any) -> None:
    service = made(bridge, card)

    def broken(call: Call) -> Any:
        raise ZeroDivisionError("a bug")

    service._request = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        asyncio.run(service.complete(call()))
    assert lines()[0]["status"] == "bug"


def test_one_who_leaves(bridge: EngineThread, card: ModelCard, lines: Any) -> None:
    """By closing the stream, and by being cancelled."""
    service = made(bridge, card)

    async def close() -> None:
        deltas = service.stream(call(tokens=10**9))
        await anext(deltas)
        await deltas.aclose()

    async def cancel() -> None:
        async def listen() -> None:
            async for _ in service.stream(call(tokens=10**9)):
                started.set()

        started = asyncio.Event()
        task = asyncio.create_task(listen())
        await started.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(close())
    asyncio.run(cancel())
    found = lines()
    assert [line["status"] for line in found] == ["cancelled", "cancelled"]
    assert all(line["completion_tokens"] >= 1 for line in found)
    assert [line["finish_reason"] for line in found] == ["", ""]


def test_it_can_be_off(bridge: EngineThread, card: ModelCard, lines: Any) -> None:
    done = asyncio.run(made(bridge, card, access=False).complete(call()))
    assert done.text == "一二三"
    assert lines() == []


def test_the_engines_own_times_and_several_answers() -> None:
    entry = Entry(call(), "poems")
    timings = Timings(queue_s=0.125, first_token_s=0.25, total_s=2.0)
    entry.add(Delta(request_id="r-1", token_ids=(1, 2), prompt_tokens=5, cached_tokens=4))
    entry.add(Delta(request_id="r-1", index=1, token_ids=(3,), finish_reason="stop"))
    entry.add(Delta(request_id="r-1", token_ids=(4,), finish_reason="length", timings=timings))
    line = json.loads(entry.line(prompts=False))
    assert (line["queue_s"], line["first_token_s"], line["total_s"]) == (0.125, 0.25, 2.0)
    assert (line["prompt_tokens"], line["cached_tokens"], line["completion_tokens"]) == (5, 4, 4)
    assert line["finish_reason"] == "length,stop"


def test_lines_go_to_standard_output_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("handlers", "propagate"):
        monkeypatch.setattr(access_log.log, name, getattr(access_log.log, name))
    level = access_log.log.level
    access_log.to_stdout()
    access_log.to_stdout()  # a second replica in the process: still one line
    access_log.log.info("%s", '{"a": 1}')
    access_log.log.setLevel(level)
    assert capsys.readouterr().out == '{"a": 1}\n'
