"""A caller who leaves ends his work, wherever it stands: behind a real server."""

import json
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest

from serve.service import Service
from serve.web.app import build
from tests.serve.web.talker import Talker, served

LONG = {"max_tokens": 10**9}
BODIES = {
    "/v1/completions": {"prompt": ["春", "风"]} | LONG,
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "你好"}]} | LONG,
    "/generate": {"inputs": ["春"], "parameters": {"max_length": 10**9}},
}
Wait = Callable[..., None]


@pytest.mark.parametrize("path", BODIES)
def test_leaving_a_stream(
    client: httpx.Client, talker: Talker, wait_until: Wait, path: str
) -> None:
    with client.stream("POST", path, json=BODIES[path] | {"stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        assert talker.running
    wait_until(lambda: not talker.running)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_leaving_before_the_first_token(
    client: httpx.Client, talker: Talker, wait_until: Wait, path: str, stream: bool
) -> None:
    talker.gate.clear()
    with raw_request(client, path, BODIES[path] | {"stream": stream}):
        wait_until(lambda: talker.running)
    wait_until(lambda: not talker.running)


@pytest.mark.parametrize("path", BODIES)
def test_leaving_while_an_answer_is_made(
    client: httpx.Client, talker: Talker, wait_until: Wait, path: str
) -> None:
    with raw_request(client, path, BODIES[path]):
        wait_until(lambda: talker.running)
    wait_until(lambda: not talker.running)


def test_a_slot_of_the_engine_is_free_again(
    service: Service, engine: Any, wait_until: Wait
) -> None:
    body = {"prompt": "春", "max_tokens": 10**9, "stream": True}
    with served(build(service, stall_s=60)) as client:
        for _ in range(engine.capacity + 1):
            with client.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
            wait_until(lambda: not engine.requests)
    assert len(engine.aborted) == engine.capacity + 1


def raw_request(client: httpx.Client, path: str, body: dict[str, Any]) -> socket.socket:
    """A request whose answer nobody reads; leaving the socket's block hangs up."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection((client.base_url.host, client.base_url.port or 80))
    with suppress(BrokenPipeError):
        connection.sendall(head.encode() + content)
    return connection
