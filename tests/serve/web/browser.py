"""One request to an application, without a server."""

import asyncio
import json
from typing import Any

import httpx
from fastapi import FastAPI


class Browser:
    """Sends one request to the application, in an event loop of its own."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    def __call__(self, method: str, path: str, **request: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **request)

        return asyncio.run(send())

    def post(self, inputs: Any = ("春风",), path: str = "/generate", **more: Any) -> httpx.Response:
        """In the EAS shape."""
        return self("POST", path, json={"inputs": inputs} | more)

    def complete(self, prompt: Any = "春风", **more: Any) -> httpx.Response:
        return self("POST", "/v1/completions", json={"prompt": prompt} | more)

    def chat(self, *said: str, **more: Any) -> httpx.Response:
        """The user speaks first, then both in turn."""
        roles = ("user", "assistant")
        messages = [{"role": roles[k % 2], "content": text} for k, text in enumerate(said)]
        return self("POST", "/v1/chat/completions", json={"messages": messages} | more)


def events(response: httpx.Response) -> list[Any]:
    """The data of server-sent events; [DONE] as it is."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *blocks, rest = response.text.split("\n\n")
    assert rest == ""
    data = [block.removeprefix("data: ") for block in blocks]
    return [one if one == "[DONE]" else json.loads(one) for one in data]
