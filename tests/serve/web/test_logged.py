"""The access log's line about each request over HTTP, whatever it comes to."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from serve.bridge import EngineThread
from serve.keys import Keys
from serve.web.app import build
from tests.serve.full_engine import FullEngine
from tests.serve.logged_calls import FULL, Deployment, Lines, made
from tests.serve.web.browser import Browser, events


@pytest.fixture
def engine() -> FullEngine:
    return FullEngine()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Lines:
    return Lines(caplog, monkeypatch)


@pytest.fixture
def deployment(bridge: EngineThread) -> Deployment:
    return made(bridge)


@pytest.fixture
def web(deployment: Deployment) -> Browser:
    return Browser(build(deployment.service, stall_s=60, log=deployment.access_log))


def test_a_request_over_http_is_one_line(web: Browser, lines: Any) -> None:
    web("POST", "/generate", json={"inputs": ["春风"], "parameters": {"max_length": 3}},
        headers={"X-Request-Id": "r-1"})  # fmt: skip
    assert len(events(web.complete(max_tokens=3, stream=True))) >= 2
    whole, streamed = lines()
    whole.pop("time")
    assert whole == FULL | {"transport": "http", "method": "POST /generate"}
    assert len(streamed.pop("request_id")) == 32, "the server's own"
    streamed.pop("time")
    others = {name: value for name, value in FULL.items() if name != "request_id"}
    assert streamed == others | {"transport": "http", "method": "POST /v1/completions"}


def test_who_leaves_amid_a_body_has_a_line(deployment: Deployment, lines: Any) -> None:
    app = build(deployment.service, stall_s=60, log=deployment.access_log)

    async def left() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError("nobody hears it")

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    asyncio.run(app(scope, left, send))
    (line,) = lines()
    assert line["status"] == "cancelled"


def test_several_prompts_are_one_call(web: Browser, lines: Any) -> None:
    body = {"prompt": ["春", "风又"], "max_tokens": 2}
    web("POST", "/v1/completions", json=body, headers={"X-Request-Id": "r-1"})
    (line,) = lines()
    assert (line["request_id"], line["finish_reason"]) == ("r-1", "length,length")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (3, 4)
    assert line["queue_s"] is None, "of which of them?"


@pytest.mark.parametrize(
    ("method", "path", "more", "status", "field"),
    [
        ("POST", "/generate", {"json": {"inputs": []}}, "invalid_value", "inputs"),
        ("POST", "/v1/completions", {"json": {"prompt": "秘", "top_p": 0}}, "RequestError",
         "top_p"),
        ("POST", "/v1/completions", {"json": {"prompt": "秘" * 99}}, "RequestError", "prompt"),
        ("POST", "/v1/completions", {"json": {"prompt": "秘", "max_tokens": 0}}, "RequestError",
         "max_tokens"),
        ("POST", "/v1/completions", {"json": {"prompt": "秘", "model": "novels"}}, "NotFound",
         "model"),
        ("POST", "/generate", {"content": b"{", "headers": {"content-type": "application/json"}},
         "not_json", ""),
        ("POST", "/generate", {"content": b"{}"}, "unsupported_media_type", ""),
        ("POST", "/generate", {"content": b" " * (5 * 2**20)}, "too_large", ""),
        ("GET", "/generate", {}, "method_not_allowed", ""),
        ("GET", "/v1/nothing", {}, "not_found", ""),
        ("GET", "/v1/models", {}, "ok", ""),
    ],
)  # fmt: skip
def test_what_http_refuses_has_its_line(
    web: Browser, lines: Any, method: str, path: str, more: Any, status: str, field: str
) -> None:
    web(method, path, **more)
    (line,) = lines()
    assert (line["method"], line["status"], line["field"]) == (f"{method} {path}", status, field)
    assert "秘" not in json.dumps(line, ensure_ascii=False)


def test_a_missing_key_over_http_has_its_line(
    deployment: Deployment, lines: Any, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text("spring-wind\n")
    file.chmod(0o600)
    app = build(deployment.service, stall_s=60, keys=Keys(file), log=deployment.access_log)
    name = {"X-Request-Id": "r" * 1000}
    Browser(app)("POST", "/v1/completions", json={"prompt": "春"}, headers=name)
    (line,) = lines()
    assert (line["status"], line["field"]) == ("Unauthenticated", "Authorization")
    assert line["request_id"] == "r" * 200


@pytest.mark.parametrize("stream", [False, True])
def test_one_who_leaves_over_http(web: Browser, lines: Any, stream: bool) -> None:
    body = json.dumps({"prompt": "春", "max_tokens": 10**9, "stream": stream}).encode()

    async def ask() -> None:
        told, sent = [{"type": "http.request", "body": body, "more_body": False}], asyncio.Event()

        async def receive() -> dict[str, Any]:
            if told:
                return told.pop()
            await (sent.wait() if stream else asyncio.sleep(0.05))
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message.get("body"):
                sent.set()

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
        headers = [(b"content-type", b"application/json")]
        await web.app(scope | {"headers": headers}, receive, send)

    asyncio.run(asyncio.wait_for(ask(), 10))
    (line,) = lines()
    assert (line["status"], line["method"]) == ("cancelled", "POST /v1/completions")
    assert line["completion_tokens"] >= 1


def test_probes_have_no_line(web: Browser, deployment: Deployment, lines: Any) -> None:
    for path in ("/healthz", "/readyz"):
        assert web("GET", path).status_code == 200
    deployment.service.draining = True
    assert web("GET", "/readyz").status_code == 503
    assert lines() == []


def test_a_bug_of_ours(deployment: Deployment, web: Browser, lines: Any) -> None:
    def broken(call: Any) -> Any:
        raise ZeroDivisionError("a bug")

    deployment.service._request = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):  # the server's log gets it
        web.complete()
    assert [line["status"] for line in lines()] == ["bug"]
