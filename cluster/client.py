"""A client of the gRPC services Generation and ClusterControl. Needs grpc and protos only.

    with Client("127.0.0.1:9000") as client:
        print(client.generate("春风", max_new_tokens=32).text)
        for chunk in client.stream("春风", seed=7):
            print(chunk.text, end="", flush=True)

AsyncClient is the same with `await` and `async for`, without what only operators ask (topology,
drain, refresh, scale). Leaving a stream early cancels it on the server. Where Ray Serve runs more
than one application, `application` names the one that is meant. `access` holds what a server with
TLS or keys asks for: Client("host:9443", access=Access(ca=Path("ca.pem"), token="...")).
"""

from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypedDict, TypeVar, Unpack, cast

import grpc

from protos import control_pb2, control_pb2_grpc
from protos import generation_pb2 as messages
from protos import generation_pb2_grpc as services

from . import connection, fields
from .access import Access
from .operations import Topologies

M = TypeVar("M")

OPEN = Access()
"""To a server without TLS and keys."""


class GenerationError(Exception):
    """A call failed: `code` is gRPC's name for the kind (INVALID_ARGUMENT, ...)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class Sampling(TypedDict, total=False):
    """What a call may ask for; what is absent has the server's default."""

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int
    max_new_tokens: int
    stop: Sequence[str]
    request_id: str
    logprobs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A whole answer; `text` is without the prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    request_id: str
    logprobs: tuple[float, ...] = ()
    """Natural logarithms, one a token, if asked for."""
    weights_version: int = 0
    """Of the weights that chose the last token: one more for each refresh."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of an answer; `finish_reason` is empty until the last one."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    request_id: str
    logprobs: tuple[float, ...] = ()
    weights_version: int = 0
    """Of the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The model that answers."""

    name: str
    parameters: int
    active_parameters: int
    max_seq_len: int
    vocab_size: int
    dtype: str
    num_layers: int
    d_model: int
    num_heads: int
    num_experts: tuple[int, ...]


class Client:
    """Calls one server, `host:port`. Each call may take `timeout_s` seconds; None: any time."""

    def __init__(
        self,
        target: str,
        *,
        application: str = "",
        timeout_s: float | None = None,
        access: Access = OPEN,
    ) -> None:
        self._channel = connection.channel(target, access)
        self._stub: Any = services.GenerationStub(self._channel)
        self._control: Any = control_pb2_grpc.ClusterControlStub(self._channel)
        self._call = {"metadata": connection.metadata(application, access), "timeout": timeout_s}

    def generate(self, prompt: str, **sampling: Unpack[Sampling]) -> Generation:
        """Continue `prompt`. Raises GenerationError."""
        with _errors():
            return _generation(self._stub.Generate(_request(prompt, sampling), **self._call))

    def stream(self, prompt: str, **sampling: Unpack[Sampling]) -> Generator[Chunk, None, None]:
        """Continue `prompt` piece by piece. Raises GenerationError."""
        with _errors():
            call = self._stub.GenerateStream(_request(prompt, sampling), **self._call)
            header = messages.StreamHeader()
            try:
                for message in call:
                    header = message.header if message.HasField("header") else header
                    yield _chunk(message, header)
            finally:
                call.cancel()  # no effect on a call that has ended

    def model(self) -> Model:
        """Ask which model answers. Raises GenerationError."""
        with _errors():
            return _model(self._stub.GetModel(messages.GetModelRequest(), **self._call))

    def topology(self) -> Topologies:
        """Who owns what, of all replicas. Raises GenerationError, as all that follow."""
        with _errors():
            answer = self._control.GetTopology(control_pb2.ControlQuery(), **self._call)
            return cast(Topologies, fields.read(answer))

    def watch_topology(self, every_s: float = 1.0) -> Generator[Topologies, None, None]:
        """The same again and again."""
        with _errors():
            query = _message(control_pb2.ControlQuery, every_s=every_s)
            call = self._control.WatchTopology(query, **self._call)
            try:
                for answer in call:
                    yield fields.read(answer)
            finally:
                call.cancel()

    def drain(self, *, resume: bool = False, within_s: float = 0.0) -> None:
        """Take no new requests while running ones finish; `resume`: take them again."""
        with _errors():
            request = _message(control_pb2.DrainRequest, resume=resume, within_s=within_s)
            self._control.Drain(request, **self._call)

    def refresh(self, checkpoint: str, *, restart: bool = False, within_s: float = 0.0) -> int:
        """Have all replicas serve other weights of the same config; returns their version."""
        with _errors():
            request = _message(
                control_pb2.RefreshRequest,
                checkpoint=checkpoint,
                restart=restart,
                within_s=within_s,
            )
            return int(self._control.Refresh(request, **self._call).version)

    def scale(self, replicas: int, *, within_s: float = 0.0) -> None:
        """Set the number of replicas."""
        with _errors():
            request = _message(control_pb2.ScaleRequest, replicas=replicas, within_s=within_s)
            self._control.Scale(request, **self._call)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncClient:
    """Client for asyncio; made inside a running event loop."""

    def __init__(
        self,
        target: str,
        *,
        application: str = "",
        timeout_s: float | None = None,
        access: Access = OPEN,
    ) -> None:
        self._channel = connection.aio_channel(target, access)
        self._stub: Any = services.GenerationStub(self._channel)
        self._call = {"metadata": connection.metadata(application, access), "timeout": timeout_s}

    async def generate(self, prompt: str, **sampling: Unpack[Sampling]) -> Generation:
        """Continue `prompt`. Raises GenerationError."""
        with _errors():
            return _generation(await self._stub.Generate(_request(prompt, sampling), **self._call))

    async def stream(
        self, prompt: str, **sampling: Unpack[Sampling]
    ) -> AsyncGenerator[Chunk, None]:
        """Continue `prompt` piece by piece. Raises GenerationError."""
        with _errors():
            call = self._stub.GenerateStream(_request(prompt, sampling), **self._call)
            header = messages.StreamHeader()
            try:
                async for message in call:
                    header = message.header if message.HasField("header") else header
                    yield _chunk(message, header)
            finally:
                call.cancel()

    async def model(self) -> Model:
        """Ask which model answers. Raises GenerationError."""
        with _errors():
            return _model(await self._stub.GetModel(messages.GetModelRequest(), **self._call))

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise GenerationError(error.code().name, error.details() or "") from None


def _request(prompt: str, sampling: Sampling) -> messages.GenerateRequest:
    return _message(messages.GenerateRequest, prompt=prompt, **sampling)


def _message(kind: type[M], **values: Any) -> M:
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:  # a wrong type, a number too large, a lone surrogate
        raise GenerationError("INVALID_ARGUMENT", str(error)) from None


def _generation(message: messages.GenerateResponse) -> Generation:
    return Generation(
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=_reason(message.finish_reason),
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        request_id=message.request_id,
        logprobs=tuple(message.logprobs),
        weights_version=message.weights_version,
    )


def _chunk(message: messages.GenerateChunk, header: messages.StreamHeader) -> Chunk:
    return Chunk(
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=_reason(message.finish.reason),
        prompt_tokens=header.prompt_tokens,
        request_id=header.request_id,
        logprobs=tuple(message.logprobs),
        weights_version=message.finish.weights_version,
    )


def _model(message: messages.ModelInfo) -> Model:
    fields = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    known = {name: fields[name] for name in Model.__dataclass_fields__}
    return Model(**known | {"num_experts": tuple(message.num_experts)})


def _reason(value: messages.FinishReason) -> str:
    """ "stop", "length" or "abort"; empty for a chunk that does not finish."""
    if value == messages.FINISH_REASON_UNSPECIFIED:
        return ""
    return str(messages.FinishReason.Name(value)).removeprefix("FINISH_REASON_").lower()
