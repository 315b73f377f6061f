"""Keys on Ray Serve's own port, and the inlet that the edge calls: the same methods twice."""

import asyncio
import inspect
import pickle
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from cluster.operations import DrainRequest, DrainResponse
from gptmoe.errors import GptMoeError, NotFound, Overloaded, RequestError, Unauthenticated
from protos import control_pb2
from protos import generation_pb2 as messages
from serve.control import ControlServicer
from serve.edge.inlet import Inlet
from serve.guard import guarded
from serve.keys import Keys
from serve.methods import METHODS
from serve.names import ALONE
from serve.rpc import Servicer
from serve.service import Service

KEY = (("authorization", "Bearer spring-wind"),)
OPERATOR = (("authorization", "Bearer river-south"),)


async def _drain(request: DrainRequest) -> DrainResponse:
    return DrainResponse()


@guarded
class Deployment(Servicer, ControlServicer, Inlet):
    keys: Keys | None = None
    operations = SimpleNamespace(drain=_drain)  # type: ignore[assignment]


class Context:
    """Ray Serve's grpc_context, as far as it is used."""

    def __init__(self, metadata: Any = ()) -> None:
        self.metadata, self.code, self.details = metadata, None, ""

    def invocation_metadata(self) -> Any:
        return self.metadata

    def set_code(self, code: Any) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self.trailing = trailing_metadata


@pytest.fixture
def deployment(service: Service) -> Deployment:
    deployment = Deployment()
    deployment.service = service
    return deployment


@pytest.fixture
def keyed(deployment: Deployment, tmp_path: Path) -> Deployment:
    file = tmp_path / "keys"
    file.write_text("spring-wind\nriver-south operator\n")
    file.chmod(0o600)
    deployment.keys = Keys(file)
    return deployment


def request(**fields: Any) -> bytes:
    return messages.GenerateRequest(prompt="静夜", max_new_tokens=3, **fields).SerializeToString()


async def read(stream: AsyncIterator[Any]) -> list[Any]:
    return [message async for message in stream]


def test_ray_serve_still_sees_the_context_parameter() -> None:
    for method in METHODS:
        assert "grpc_context" in inspect.signature(getattr(Deployment, method.name)).parameters
        made = inspect.isasyncgenfunction(getattr(Deployment, method.name))
        assert made is method.streaming, method.name


def test_without_keys_everybody_may_ask(deployment: Deployment) -> None:
    context = Context()
    assert asyncio.run(deployment.Generate(request(), context)).text == "一二三"
    assert context.code is None


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer autumn-moon"),)])
def test_unary_methods_want_the_key(keyed: Deployment, metadata: Any) -> None:
    for method in METHODS:
        if method.streaming:
            continue
        context = Context(metadata)
        answer = asyncio.run(getattr(keyed, method.name)(b"", context))
        assert answer == method.answer()
        assert context.code == grpc.StatusCode.UNAUTHENTICATED
        assert "key" in context.details


@pytest.mark.parametrize("method", [m.name for m in METHODS if m.streaming])
def test_streams_want_the_key(keyed: Deployment, method: str) -> None:
    context = Context()
    stream = getattr(keyed, method)(request(), context)
    with pytest.raises(Unauthenticated):
        asyncio.run(read(stream))
    assert context.code == grpc.StatusCode.UNAUTHENTICATED


def test_the_key_opens(keyed: Deployment) -> None:
    assert asyncio.run(keyed.Generate(request(), Context(KEY))).text == "一二三"
    chunks = asyncio.run(read(keyed.GenerateStream(request(), Context(KEY))))
    assert "".join(chunk.text for chunk in chunks) == "一二三"


def test_what_operates_wants_an_operators_key(keyed: Deployment) -> None:
    refused = set()
    for method in METHODS:
        context = Context(KEY)
        with suppress(AttributeError, GptMoeError):  # this deployment can do little else
            answer = getattr(keyed, method.name)(b"", context)
            asyncio.run(read(answer) if method.streaming else answer)
        if context.code == grpc.StatusCode.PERMISSION_DENIED:
            assert context.details.startswith(f"{method.name} wants an operator's key")
            refused.add(method.name)
    assert refused == {"Drain", "Refresh", "Scale"}
    context = Context(OPERATOR)
    assert asyncio.run(keyed.Drain(b"", context)) == control_pb2.DrainResponse()
    assert context.code is None
    assert asyncio.run(keyed.Generate(request(), Context(OPERATOR))).text == "一二三"


def test_the_inlet_answers_in_bytes_without_asking_again(keyed: Deployment) -> None:
    answer = asyncio.run(keyed.edge_unary("Generate", request(request_id="mine"), ALONE))
    assert messages.GenerateResponse.FromString(answer).text == "一二三"
    parcels = asyncio.run(read(keyed.edge_stream("GenerateStream", request(), ALONE)))
    chunks = [messages.GenerateChunk.FromString(chunk) for parcel in parcels for chunk in parcel]
    texts = [chunk.text for chunk in chunks]
    assert "".join(texts) == "一二三"
    drain = control_pb2.DrainRequest().SerializeToString()
    assert asyncio.run(keyed.edge_unary("Drain", drain, ALONE)) == b""


def test_the_inlet_hands_errors_over_as_they_are(deployment: Deployment, engine: Any) -> None:
    for data, kind in ((request(top_p=7), RequestError), (request(model="another"), NotFound)):
        assert isinstance(asyncio.run(deployment.edge_unary("Generate", data, ALONE)), kind)
        (error,) = asyncio.run(read(deployment.edge_stream("GenerateStream", data, ALONE)))
        assert isinstance(error, kind)
    engine.capacity = 0
    error = asyncio.run(deployment.edge_unary("Generate", request(), ALONE))
    assert isinstance(error, Overloaded)
    assert pickle.loads(pickle.dumps(error)).retry_after_s == 1.5


def test_leaving_the_inlet_frees_the_place(
    deployment: Deployment, engine: Any, wait_until: Any
) -> None:
    async def leave() -> None:
        stream = deployment.edge_stream("GenerateStream", request(request_id="mine"), ALONE)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]

    engine.gate.set()
    asyncio.run(leave())
    wait_until(lambda: "mine" not in engine.requests)


def test_the_inlet_knows_only_our_methods(deployment: Deployment) -> None:
    for name in ("edge_unary", "__del__", "Nothing"):
        with pytest.raises(KeyError):
            asyncio.run(deployment.edge_unary(name, b"", ALONE))
