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
from typing import Any, Self, TypeVar, Unpack, cast

import grpc

from protos import control_pb2, control_pb2_grpc
from protos import generation_pb2 as messages
from protos import generation_pb2_grpc as services

from . import answers, connection, fields
from .access import OPEN, Access
from .answers import (
    Choice,
    Chunk,
    Generation,
    GenerationError,
    Model,
    Sampling,
    Scored,
    ScoreOptions,
    Timings,
    Tokens,
)
from .operations import Topologies

__all__ = [
    "AsyncClient",
    "Choice",
    "Chunk",
    "Client",
    "Generation",
    "GenerationError",
    "Model",
    "Sampling",
    "ScoreOptions",
    "Scored",
    "Timings",
    "Tokens",
]

M = TypeVar("M")
Prompt = str | Sequence[int]
"""A text, or its token ids."""


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

    def generate(self, prompt: Prompt, **sampling: Unpack[Sampling]) -> Generation:
        """Continue `prompt`. Raises GenerationError, as all that follow."""
        with _errors():
            answer = self._stub.Generate(_request(prompt, sampling), **self._call)
            return answers.generation(answer)

    def stream(self, prompt: Prompt, **sampling: Unpack[Sampling]) -> Generator[Chunk, None, None]:
        """Continue `prompt` piece by piece; for n > 1 pieces of different `index` alternate."""
        with _errors():
            call = self._stub.GenerateStream(_request(prompt, sampling), **self._call)
            header = messages.StreamHeader()
            try:
                for message in call:
                    header = message.header if message.HasField("header") else header
                    if not _is_header(message):
                        yield answers.chunk(message, header)
            finally:
                call.cancel()  # no effect on a call that has ended

    def score(
        self, prompt: str, continuations: Sequence[str], **options: Unpack[ScoreOptions]
    ) -> tuple[Scored, ...]:
        """How likely each continuation of `prompt` is."""
        with _errors():
            request = _score(prompt, continuations, options)
            return answers.scores(self._stub.Score(request, **self._call))

    def tokenize(self, text: str) -> Tokens:
        """The tokens of a text."""
        with _errors():
            request = _message(messages.TokenizeRequest, text=text)
            return answers.tokens(self._stub.Tokenize(request, **self._call))

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens."""
        with _errors():
            request = _message(messages.DetokenizeRequest, token_ids=token_ids)
            return str(self._stub.Detokenize(request, **self._call).text)

    def abort(self, request_id: str) -> None:
        """End a running request, on whatever replica; its caller gets what was generated."""
        with _errors():
            request = _message(messages.AbortRequest, request_id=request_id)
            self._stub.Abort(request, **self._call)

    def model(self, name: str = "") -> Model:
        """The model that answers; `name`: the one of that name."""
        with _errors():
            request = _message(messages.GetModelRequest, model=name)
            return answers.model(self._stub.GetModel(request, **self._call))

    def models(self) -> tuple[Model, ...]:
        """All that are served."""
        with _errors():
            answer = self._stub.ListModels(messages.ListModelsRequest(), **self._call)
            return tuple(map(answers.model, answer.models))

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

    async def generate(self, prompt: Prompt, **sampling: Unpack[Sampling]) -> Generation:
        """See Client, as for all methods."""
        with _errors():
            answer = await self._stub.Generate(_request(prompt, sampling), **self._call)
            return answers.generation(answer)

    async def stream(
        self, prompt: Prompt, **sampling: Unpack[Sampling]
    ) -> AsyncGenerator[Chunk, None]:
        with _errors():
            call = self._stub.GenerateStream(_request(prompt, sampling), **self._call)
            header = messages.StreamHeader()
            try:
                async for message in call:
                    header = message.header if message.HasField("header") else header
                    if not _is_header(message):
                        yield answers.chunk(message, header)
            finally:
                call.cancel()

    async def score(
        self, prompt: str, continuations: Sequence[str], **options: Unpack[ScoreOptions]
    ) -> tuple[Scored, ...]:
        with _errors():
            request = _score(prompt, continuations, options)
            return answers.scores(await self._stub.Score(request, **self._call))

    async def tokenize(self, text: str) -> Tokens:
        with _errors():
            request = _message(messages.TokenizeRequest, text=text)
            return answers.tokens(await self._stub.Tokenize(request, **self._call))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        with _errors():
            request = _message(messages.DetokenizeRequest, token_ids=token_ids)
            return str((await self._stub.Detokenize(request, **self._call)).text)

    async def abort(self, request_id: str) -> None:
        with _errors():
            request = _message(messages.AbortRequest, request_id=request_id)
            await self._stub.Abort(request, **self._call)

    async def model(self, name: str = "") -> Model:
        with _errors():
            request = _message(messages.GetModelRequest, model=name)
            return answers.model(await self._stub.GetModel(request, **self._call))

    async def models(self) -> tuple[Model, ...]:
        with _errors():
            answer = await self._stub.ListModels(messages.ListModelsRequest(), **self._call)
            return tuple(map(answers.model, answer.models))

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
        raise answers.failure(error) from None


def _request(prompt: Prompt, sampling: Sampling) -> messages.GenerateRequest:
    given = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
    return _message(messages.GenerateRequest, **given, **sampling)


def _score(
    prompt: str, continuations: Sequence[str], options: ScoreOptions
) -> messages.ScoreRequest:
    return _message(messages.ScoreRequest, prompt=prompt, continuations=continuations, **options)


def _message(kind: type[M], **values: Any) -> M:
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:  # a wrong type, a number too large, a lone surrogate
        raise GenerationError("INVALID_ARGUMENT", str(error)) from None


def _is_header(message: messages.GenerateChunk) -> bool:
    """Whether a chunk has nothing else."""
    return message.HasField("header") and not (message.token_ids or message.HasField("finish"))
