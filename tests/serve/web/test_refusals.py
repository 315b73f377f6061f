"""Each error of the service as a status, in both shapes, before a stream and within one."""

import logging
from typing import Any

import httpx
import pytest

from gptmoe.errors import (
    AlreadyRunning,
    ClusterError,
    DeadlineExceeded,
    GptMoeError,
    Overloaded,
    PermissionDenied,
    Unavailable,
)
from serve.service import Service
from tests.serve.web.browser import Browser, events
from tests.serve.web.talker import Talker

ERRORS = [
    (PermissionDenied("not yours"), 403, "Authorization", "permission_denied", None),
    (AlreadyRunning("a runs"), 409, "X-Request-Id", "already_running", None),
    (DeadlineExceeded("late"), 408, "deadline_ms", "deadline_exceeded", None),
    (Overloaded("full", 1.2), 429, "", "overloaded", "2"),
    (Overloaded("full", 0.0), 429, "", "overloaded", "1"),
    (Unavailable("away", 30), 503, "", "unavailable", "30"),
    (Unavailable("drained", None), 503, "", "unavailable", None),
    (ClusterError("gone"), 503, "", "unavailable", None),
]


@pytest.mark.parametrize(("error", "status", "field", "code", "retry"), ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_is_a_status(
    talking: Browser, talker: Talker, error: GptMoeError, status: int, field: str, code: str,
    retry: str | None, stream: bool,
) -> None:  # fmt: skip
    talker.refusal = error
    plain = talking.post(stream=stream)
    assert plain.json() == {"error": {"message": str(error), "field": field}}
    for response in (talking.complete(stream=stream), talking.chat("你好", stream=stream)):
        wanted: dict[str, Any] = {"message": str(error), "param": field or None, "code": code}
        kind = {429: "rate_limit_error", 503: "server_error"}.get(status, "invalid_request_error")
        assert response.json() == {"error": wanted | {"type": kind}}
    for response in (plain, talking.complete(stream=stream), talking.chat("好", stream=stream)):
        assert response.status_code == status
        assert response.headers.get("retry-after") == retry


@pytest.mark.parametrize("error", [error for error, *_ in ERRORS])
def test_clients_are_told_not_to_repeat_what_fails_again(
    talking: Browser, talker: Talker, error: GptMoeError
) -> None:
    """OpenAI's send 408, 409, 429 and 5xx again by themselves: an expired deadline three times."""
    talker.refusal = error
    response = talking.complete()
    told = "false" if response.status_code in (408, 409) else None
    assert response.headers.get("x-should-retry") == told


def test_an_error_within_a_stream_is_its_last_event(talking: Browser, talker: Talker) -> None:
    talker.breaks_after = 2
    for response in (talking.complete(stream=True), talking.chat("你好", stream=True)):
        *pieces, last = events(response)
        assert len(pieces) >= 2
        assert last["error"]["code"] == "unavailable"
        assert "engine has stopped" in last["error"]["message"]


def test_one_of_several_prompts_that_fails_ends_them_all(talking: Browser, talker: Talker) -> None:
    response = talking.complete(["春", "春" * 64], max_tokens=1)
    assert response.status_code == 400
    assert not talker.running


def test_an_expired_deadline_is_408(talking: Browser, talker: Talker) -> None:
    for response in (
        talking.complete(deadline_ms=1, max_tokens=10**6),
        talking.chat("你好", deadline_ms=1, max_tokens=10**6),
        talking.post(parameters={"deadline_ms": 1, "max_length": 10**6}),
    ):
        assert response.status_code == 408
        assert "the deadline of 0.001 s has passed" in response.json()["error"]["message"]
    assert not talker.running


def test_a_deadline_within_a_stream_is_its_last_event(talking: Browser) -> None:
    *_, last = events(talking.complete(deadline_ms=50, max_tokens=10**6, stream=True))
    assert last["error"]["param"] == "deadline_ms"


def test_a_deadline_of_0_is_none(talking: Browser, talker: Talker) -> None:
    assert talking.complete(deadline_ms=0, max_tokens=1).status_code == 200
    assert talker.requests[0].deadline_s is None


def test_a_bug_of_ours_says_nothing_of_itself(
    client: httpx.Client,
    talk: Service,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(call: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "propagate", True)
    sentence = "the server failed at this request; its log says why"
    with monkeypatch.context() as broken:
        broken.setattr(talk, "stream", fail)
        close = {"connection": "close"}  # as the server does after a bug
        plain = client.post("/generate", json={"inputs": ["春"]}, headers=close)
        openai = client.post("/v1/completions", json={"prompt": "春"}, headers=close)
    assert (plain.status_code, openai.status_code) == (500, 500)
    assert plain.json() == {"error": {"message": sentence, "field": ""}}
    assert openai.json()["error"] == {
        "message": sentence, "type": "server_error", "param": None, "code": "internal",
    }  # fmt: skip
    assert "ZeroDivisionError: secret" in caplog.text
    assert client.post("/generate", json={"inputs": ["春"]}).status_code == 200


def test_ready_and_alive(talking: Browser, talker: Talker, talk: Service) -> None:
    assert talking("GET", "/healthz").json() == {"status": "ok"}
    assert talking("GET", "/readyz").json() == {"status": "ok"}
    talk.draining = True
    try:
        assert talking("GET", "/healthz").status_code == 200
        for response in (talking("GET", "/readyz"), talking.complete()):
            assert response.status_code == 503
            assert "ask another server" in response.json()["error"]["message"]
            assert "retry-after" not in response.headers, "it would be asked each second"
    finally:
        talk.draining = False
    talker.refusal = ClusterError("the engine has computed one step for over 60 s")
    for path in ("/healthz", "/readyz"):
        response = talking("GET", path)
        assert response.status_code == 503
        assert "one step for over 60 s" in response.json()["error"]["message"]


def test_probes_may_ask_for_the_status_alone(client: httpx.Client, talker: Talker) -> None:
    for path in ("/healthz", "/readyz"):
        response = client.head(path)
        assert (response.status_code, response.text) == (200, "")
    talker.refusal = ClusterError("the engine has computed one step for over 60 s")
    for path in ("/healthz", "/readyz"):
        assert client.head(path).status_code == 503


def test_models(talking: Browser) -> None:
    [model] = talking("GET", "/v1/models").json()["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("poems", "model", "gptmoe")
    assert talking("GET", "/v1/models/poems").json() == model
    unknown = talking("GET", "/v1/models/gpt-4")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"
