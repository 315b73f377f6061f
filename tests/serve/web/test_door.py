"""Keys, sizes, types, texts: what is refused before a route sees it, on every route."""

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.keys import Keys
from serve.service import Service
from serve.web.app import build
from tests.serve.web.browser import Browser
from tests.serve.web.talker import Keyring, Talker, served

POSTS = ("/v1/completions", "/v1/chat/completions", "/generate", "/generate/stream")
GOOD = b'{"prompt": "\xe6\x98\xa5", "max_tokens": 2}'
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def guarded(talk: Service) -> Browser:
    return Browser(build(talk, stall_s=60, keys=Keyring("sesame"), max_body_bytes=1000))


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize("given", [None, "Bearer wrong", "sesame", "Basic c2VzYW1l"])
@pytest.mark.parametrize("path", [*POSTS, "/v1/models", "/model", "/nothing"])
def test_without_the_key_nothing_is_answered(
    guarded: Browser, talker: Talker, path: str, given: str | None
) -> None:
    headers = JSON | ({"authorization": given} if given else {})
    method = "POST" if path in POSTS else "GET"
    response = guarded(method, path, content=GOOD, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert "key is missing or wrong" in error_of(response)["message"]
    assert ("code" in error_of(response)) == path.startswith("/v1/")
    assert not talker.requests


def test_with_the_key_all_is(guarded: Browser, talker: Talker) -> None:
    headers = JSON | {"authorization": "Bearer sesame"}
    assert guarded("POST", "/v1/completions", content=GOOD, headers=headers).status_code == 200
    assert guarded("GET", "/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/openapi.json", "/docs"])
def test_health_and_schema_need_no_key(guarded: Browser, path: str) -> None:
    assert guarded("GET", path).status_code == 200


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("path", POSTS)
def test_a_large_body_is_413(guarded: Browser, path: str, told: bool) -> None:
    async def chunks() -> Any:
        for _ in range(11):
            yield b" " * 100

    content: Any = b" " * 1100 if told else chunks()
    headers = JSON | {"authorization": "Bearer sesame"}
    response = guarded("POST", path, content=content, headers=headers)
    assert response.status_code == 413
    assert "must have at most 1000 bytes" in error_of(response)["message"]


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "the body is not valid JSON"),
        (b"", "the body is missing"),
        (
            b'{"inputs": ["\xff"], "prompt": "\xff"}',
            " must be UTF-8 text; found other bytes at byte 13 of the body",
        ),
        (
            '{"prompt": "春"}'.encode("utf-16"),
            "the body must be UTF-8 text; found other bytes at byte 0",
        ),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "a is not a known field"),
        (b'{"a": ' + b"1" * 5000 + b"}", "too many digits"),
        (b'{"\\ud800": 1}', "unable to parse raw data as a unicode string"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
    ],
)
def test_unreadable_bodies_are_400(
    talking: Browser, path: str, content: bytes, sentence: str
) -> None:
    response = talking("POST", path, content=content, headers=JSON)
    messages = error_of(response)["message"]
    assert response.status_code == 400
    assert sentence in messages or (sentence.startswith("a is") and "is missing" in messages)


@pytest.mark.parametrize(
    ("path", "content", "name"),
    [
        ("/v1/completions", '{"user": "\\u6625", "prompt": "春"}', "prompt"),
        ("/v1/completions", '{"prompt": "a", "stop": ["b", "春"]}', "stop.1"),
        ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "春"}]}',
         "messages.0.content"),
        ("/generate", '{"inputs": ["春"], "parameters": {"stop": ["夏"]}}', "inputs.0"),
        ("/generate", '{"inputs": ["a"], "春": 1}', ""),
        ("/generate", '{"inputs": ["春"]', ""),
    ],
)  # fmt: skip
def test_a_text_that_is_no_utf8_is_named(
    talking: Browser, path: str, content: str, name: str
) -> None:
    response = talking("POST", path, content=content.encode("gbk"), headers=JSON)
    error = error_of(response)
    assert response.status_code == 400
    assert (error.get("param", error.get("field")) or "") == name
    start = len(content.partition("春")[0])
    expected = f"{name or 'the body'} must be UTF-8 text; found other bytes at byte {start}"
    assert error["message"] == f"{expected} of the body"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "max_tokens", "seed", "user"])
def test_what_is_no_number_is_named(talking: Browser, name: str, number: str) -> None:
    content = f'{{"prompt": "a", "{name}": {number}}}'
    response = talking("POST", "/v1/completions", content=content, headers=JSON)
    assert response.status_code == 400
    assert error_of(response)["param"] == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", '"\\ud800"'),
        ("stop", '["\\ud800"]'),
        ("model", '"\\ud800"'),
        ("user", '"\\ud800"'),
    ],
)
def test_lone_surrogates_are_named(talking: Browser, name: str, value: str) -> None:
    prompt = "" if name == "prompt" else '"prompt": "a", '
    content = f'{{{prompt}"{name}": {value}}}'
    response = talking("POST", "/v1/completions", content=content, headers=JSON)
    assert response.status_code == 400
    assert error_of(response)["param"] == name


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_wrong_content_type_is_415(talking: Browser, path: str, kind: str) -> None:
    headers = {"content-type": kind} if kind else {}
    response = talking("POST", path, content=GOOD, headers=headers)
    assert response.status_code == 415
    sentence = f"the body must be JSON; found {kind or 'none'}; send the header Content-Type"
    assert sentence in error_of(response)["message"]


def test_a_charset_may_be_told(talking: Browser) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert talking("POST", "/v1/completions", content=GOOD, headers=headers).status_code == 200


@pytest.mark.parametrize(("told", "most_reads"), [(True, 0), (False, 5)])
def test_a_hundred_megabytes_are_not_read(talking: Browser, told: bool, most_reads: int) -> None:
    reads = 0

    async def receive() -> dict[str, Any]:
        nonlocal reads
        reads += 1
        return {"type": "http.request", "body": b" " * 2**20, "more_body": reads < 100}

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    headers += [(b"content-length", str(100 * 2**20).encode())] if told else []
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
    asyncio.run(talking.app(scope | {"headers": headers}, receive, send))
    assert sent[0]["status"] == 413
    assert reads <= most_reads


@pytest.mark.parametrize("told", [True, False])
def test_a_server_goes_on_after_a_hundred_megabytes(client: httpx.Client, told: bool) -> None:
    content = itertools.repeat(b" " * 2**20, 100)
    headers = JSON | ({"content-length": str(100 * 2**20)} if told else {})
    response = client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 413
    assert error_of(response)["code"] == "too_large"
    assert client.post("/v1/completions", content=GOOD, headers=JSON).status_code == 200


def test_an_unknown_path_and_method(talking: Browser) -> None:
    assert talking("GET", "/nothing").json() == {"error": {"message": "Not Found", "field": ""}}
    unknown = talking("GET", "/v1/nothing")
    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "not_found")
    wrong = talking("GET", "/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("path", ["/v1/completions/", "/generate/", "/healthz/"])
def test_no_caller_is_sent_on_elsewhere(talking: Browser, path: str) -> None:
    """Behind a proxy with TLS the server would name http://, and the key go out in the open."""
    for method in ("GET", "POST"):
        response = talking(method, path)
        assert (response.status_code, response.headers.get("location")) == (404, None)


def test_a_long_request_id_is_named(talking: Browser) -> None:
    headers = JSON | {"X-Request-Id": "a" * 201}
    response = talking("POST", "/v1/completions", content=GOOD, headers=headers)
    assert response.status_code == 400
    assert error_of(response)["param"] == "X-Request-Id"
    assert "at most 200 characters" in error_of(response)["message"]


def test_the_body_of_a_refusal_is_json(guarded: Browser) -> None:
    response = guarded("POST", "/generate", content=GOOD, headers=JSON)
    assert response.headers["content-type"] == "application/json"
    assert json.loads(response.content)["error"]["field"] == "Authorization"


def test_keys_guard_a_real_server_too(talk: Service, talker: Talker) -> None:
    with served(build(talk, stall_s=60, keys=Keyring("sesame"))) as client:
        assert client.post("/generate", content=GOOD, headers=JSON).status_code == 401
        assert client.get("/healthz").json() == {"status": "ok"}


def test_keys_are_exchanged_while_the_server_runs(
    talk: Service, talker: Talker, tmp_path: Path
) -> None:
    """New keys open at once, old ones no more; a spoilt file changes nothing."""
    file = tmp_path / "keys"

    def write(text: str) -> None:
        new = tmp_path / "new"
        new.write_text(text)
        new.chmod(0o600)
        new.replace(file)

    write("spring-wind\nriver-south operator\n")
    talker.most_tokens = 2
    with served(build(talk, stall_s=60, keys=Keys(file))) as client:

        def status(token: str) -> int:
            headers = JSON | {"authorization": f"Bearer {token}"}
            return client.post("/v1/completions", content=GOOD, headers=headers).status_code

        tokens = ("spring-wind", "river-south", "autumn-moon", "spring-win", "river-south operator")
        assert [status(token) for token in tokens] == [200, 200, 401, 401, 401]
        write("autumn-moon\n")
        assert [status(token) for token in tokens] == [401, 401, 200, 401, 401]
        write("two words\n")
        assert [status(token) for token in tokens] == [401, 401, 200, 401, 401]
        file.unlink()
        assert status("autumn-moon") == 200
        for shown, sentence in (
            ("Bearer 春风", "not one of this server's"),
            ("Basic c3ByaW5nLXdpbmQ=", "must be Bearer and a token"),
        ):
            headers = {"authorization": shown.encode()}
            refused = client.get("/v1/models", headers=headers)
            assert refused.status_code == 401
            assert sentence in error_of(refused)["message"]
            assert refused.headers["www-authenticate"] == "Bearer"


class Parts:
    """What a caller sends, part by part; behind the last one it says nothing more."""

    def __init__(self, *parts: bytes, leaves: bool = False) -> None:
        self._parts = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        self._leaves = leaves

    async def __call__(self) -> Any:
        if self._parts:
            return self._parts.pop(0)
        if self._leaves:
            return {"type": "http.disconnect"}
        await asyncio.Event().wait()


async def answered(app: Any, receive: Any) -> list[Any]:
    """What the application sends to a completion whose body comes like this."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    await app(scope | {"query_string": b"", "http_version": "1.1"}, receive, send)
    return sent


def test_half_a_body_is_not_waited_for_for_ever(
    guarded: Browser, talk: Service, talker: Talker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many of them none has long, so that others find a place."""
    monkeypatch.setattr("serve.web.body.CROWDED_S", 0.05)
    monkeypatch.setattr("serve.web.body.MANY", 2)
    app = build(talk, stall_s=60)

    async def crowd() -> tuple[Any, Any]:
        patient = [asyncio.create_task(answered(app, Parts(b"{"))) for _ in range(2)]
        await asyncio.sleep(0)
        refused = await asyncio.wait_for(answered(app, Parts(b'{"prom')), 5)
        for task in patient:
            assert not task.done()
            task.cancel()
        return refused

    start, body = asyncio.run(crowd())
    assert start["status"] == 408
    assert "the body must arrive within 0.05 s" in json.loads(body["body"])["error"]["message"]
    assert not talker.requests


def test_nobody_answers_who_left_in_midst_of_a_body(talk: Service, talker: Talker) -> None:
    app = build(talk, stall_s=60)
    assert asyncio.run(answered(app, Parts(GOOD[:5], leaves=True))) == []
    assert not talker.requests
