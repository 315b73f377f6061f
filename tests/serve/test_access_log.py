"""The line about each call, whatever it comes to. Over HTTP: web/test_logged.py."""

import asyncio
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from gptmoe.errors import GptMoeError
from gptmoe.generate.delta import Delta, Timings
from protos import control_pb2
from protos import generation_pb2 as messages
from serve import access_log
from serve.access_log import Entry
from serve.bridge import EngineThread
from serve.keys import Keys
from serve.methods import METHODS
from serve.names import Ticket
from serve.refusals import Direct

from .asking import Context, request
from .full_engine import FullEngine
from .logged_calls import FULL, Deployment, Lines, made


class Asked(Context):
    """With a key, or without."""

    def __init__(self, key: str = "") -> None:
        super().__init__()
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()

    def invocation_metadata(self) -> Any:
        return self._metadata


@pytest.fixture
def engine() -> FullEngine:
    return FullEngine()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Lines:
    return Lines(caplog, monkeypatch)


@pytest.fixture
def deployment(bridge: EngineThread) -> Deployment:
    return made(bridge)


def ask(deployment: Deployment, method: str, data: bytes, context: Any = None) -> Any:
    """A method's answer, or its answers."""

    async def answers() -> Any:
        answer = getattr(deployment, method)(data, context or Asked())
        if not hasattr(answer, "__aiter__"):
            return await answer
        return [message async for message in answer]

    return asyncio.run(answers())


def test_a_call_is_one_line(deployment: Deployment, lines: Any) -> None:
    ask(deployment, "Generate", request(max_new_tokens=3, request_id="r-1"))
    (line,) = lines()
    assert line.pop("time").endswith("+00:00")
    assert line == FULL


def test_a_stream_is_one_line(deployment: Deployment, lines: Any) -> None:
    chunks = ask(deployment, "GenerateStream", request(max_new_tokens=3, request_id="r-1"))
    assert len(chunks) >= 2
    (line,) = lines()
    line.pop("time")
    assert line == FULL | {"method": "GenerateStream"}


def test_the_edge_asks_by_the_same_line(deployment: Deployment, lines: Any) -> None:
    async def ask_both() -> None:
        data = request(max_new_tokens=3, request_id="r-1")
        await deployment.edge_unary("Generate", data, Ticket("r-1"))
        assert [
            chunk async for chunk in deployment.edge_stream("GenerateStream", data, Ticket("r-1"))
        ]
        error = await deployment.edge_unary(
            "Generate", request(top_p=0, request_id="r-2"), Ticket("r-2")
        )
        assert isinstance(error, GptMoeError)

    asyncio.run(ask_both())
    found = [(line["method"], line["request_id"], line["status"]) for line in lines()]
    assert found == [
        ("Generate", "r-1", "ok"),
        ("GenerateStream", "r-1", "ok"),
        ("Generate", "r-2", "RequestError"),
    ]


def test_what_the_edge_has_refused_is_called_as_it_was_called_there(
    deployment: Deployment, lines: Any
) -> None:
    async def ask_both(ticket: Ticket, **fields: Any) -> None:
        data = request(top_p=0, **fields)
        await deployment.edge_unary("Generate", data, ticket)
        assert [answer async for answer in deployment.edge_stream("GenerateStream", data, ticket)]

    asyncio.run(ask_both(Ticket("drawn")))
    asyncio.run(ask_both(Ticket("drawn"), request_id="mine"))
    found = [(line["request_id"], line["status"]) for line in lines()]
    assert found == [(name, "RequestError") for name in ("drawn", "drawn", "mine", "mine")]


@pytest.mark.parametrize(
    ("method", "message", "status", "field", "name"),
    [
        ("Score", messages.ScoreRequest(prompt="春", continuations=["风"]), "ok", "", ""),
        ("Score", messages.ScoreRequest(prompt="春"), "RequestError", "continuations", ""),
        ("Tokenize", messages.TokenizeRequest(text="春"), "ok", "", ""),
        ("Detokenize", messages.DetokenizeRequest(token_ids=[-1]), "RequestError", "token_ids", ""),
        ("GetModel", messages.GetModelRequest(model="novels"), "NotFound", "", ""),
        ("ListModels", messages.ListModelsRequest(), "ok", "", ""),
        ("Abort", messages.AbortRequest(request_id="r-9"), "NotFound", "", "r-9"),
        ("Drain", control_pb2.DrainRequest(), "ok", "", ""),
    ],
)
def test_every_method_has_its_line(
    deployment: Deployment, lines: Any, method: str, message: Any, status: str, field: str,
    name: str,
) -> None:  # fmt: skip
    ask(deployment, method, message.SerializeToString())
    (line,) = lines()
    assert [line[key] for key in ("method", "status", "field", "request_id", "transport")] == [
        method, status, field, name, "grpc",
    ]  # fmt: skip
    assert line["total_s"] >= 0
    assert (line["finish_reason"], line["completion_tokens"], line["queue_s"]) == ("", 0, None)


@pytest.mark.parametrize(
    ("data", "field", "name"),
    [
        (b"\xff\xff\xff\xff", "", ""),
        (b"\x0a\x02\xff\xfe", "prompt", ""),
        (request(temperature=float("nan"), request_id="r-1"), "temperature", "r-1"),
        (request("秘" * 1000, request_id="r-1"), "prompt", "r-1"),
    ],
)
def test_what_is_refused_names_the_field_not_the_words(
    deployment: Deployment, lines: Any, data: bytes, field: str, name: str
) -> None:
    ask(deployment, "Generate", data)
    with pytest.raises(GptMoeError):
        ask(deployment, "GenerateStream", data)
    unary, streamed = lines()
    assert streamed["method"] == "GenerateStream"
    for line in (unary, streamed):
        found = (line["status"], line["field"], line["request_id"])
        assert found == ("RequestError", field, name)
        assert "秘" not in json.dumps(line, ensure_ascii=False)
        assert line["first_token_s"] is None


def test_a_caller_without_a_good_key_has_a_line(
    deployment: Deployment, lines: Any, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text("spring-wind\n")
    file.chmod(0o600)
    deployment.keys = Keys(file)
    for key in ("", "autumn-moon", "spring-wind"):
        ask(deployment, "Generate", request(max_new_tokens=1), Asked(key))
    with pytest.raises(GptMoeError):
        ask(deployment, "GenerateStream", request())
    ask(deployment, "Drain", b"", Asked("spring-wind"))
    ask(deployment, "Drain", b"", Direct())
    assert [(line["method"], line["status"]) for line in lines()] == [
        ("Generate", "Unauthenticated"),
        ("Generate", "Unauthenticated"),
        ("Generate", "ok"),
        ("GenerateStream", "Unauthenticated"),
        ("Drain", "PermissionDenied"),
        ("Drain", "ok"),
    ]
    assert "autumn" not in json.dumps(lines())


def test_every_method_is_wrapped_and_ray_serve_still_sees_the_context() -> None:
    for method in METHODS:
        found = getattr(Deployment, method.name)
        assert found.__code__.co_filename.endswith("logged.py")
        assert "grpc_context" in inspect.signature(found).parameters
        assert inspect.isasyncgenfunction(found) is method.streaming


def test_no_prompt_unless_asked_for(bridge: EngineThread, lines: Any) -> None:
    ask(made(bridge), "Generate", request(max_new_tokens=1))
    ask(made(bridge, prompts=True), "Generate", request(max_new_tokens=1))
    without, with_it = lines()
    assert "春风" not in json.dumps(without, ensure_ascii=False)
    assert with_it["prompt"] == "春风"


def test_a_full_queue(deployment: Deployment, engine: Any, lines: Any) -> None:
    engine.capacity = 0
    ask(deployment, "Generate", request())
    assert lines()[0]["status"] == "Overloaded"


def test_a_bug_of_ours(deployment: Deployment, lines: Any) -> None:
    def broken(call: Any) -> Any:
        raise ZeroDivisionError("a bug")

    deployment.service._request = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        ask(deployment, "Generate", request())
    assert [line["status"] for line in lines()] == ["bug"]


def test_one_who_leaves(deployment: Deployment, lines: Any) -> None:
    """By closing the stream, and by being cancelled."""
    endless = request(max_new_tokens=10**9)

    async def close() -> None:
        chunks = deployment.GenerateStream(endless, Asked())
        assert (await anext(chunks)).header.request_id
        await anext(chunks)
        await chunks.aclose()  # type: ignore[attr-defined]

    async def cancel() -> None:
        async def listen() -> None:
            async for chunk in deployment.GenerateStream(endless, Asked()):
                if chunk.text:
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


def test_it_can_be_off(bridge: EngineThread, lines: Any) -> None:
    deployment = made(bridge, access=False)
    assert ask(deployment, "Generate", request(max_new_tokens=3)).text == "一二三"
    assert ask(deployment, "Generate", request(top_p=0)).text == ""
    assert lines() == []


# --- the line itself -------------------------------------------------------------------------


def test_the_engines_own_times_and_several_answers() -> None:
    entry = Entry("Generate", "grpc", "poems")
    assert entry.ask("r-1", "春风") == 0
    timings = Timings(queue_s=0.125, first_token_s=0.25, total_s=2.0)
    entry.add(0, Delta(request_id="r-1", token_ids=(1, 2), prompt_tokens=5, cached_tokens=4))
    entry.add(0, Delta(request_id="r-1", index=1, token_ids=(3,), finish_reason="stop"))
    entry.add(0, Delta(request_id="r-1", token_ids=(4,), finish_reason="length", timings=timings))
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
