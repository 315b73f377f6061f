"""Replicas without a model, behind something like a Ray Serve DeploymentHandle."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from gptmoe.errors import GptMoeError
from protos import generation_pb2 as messages
from serve.edge.inlet import Answer, Answers, Progress
from serve.names import Ticket

POEM = "床前明月光，疑是地上霜。"


IDLE = Progress(pending=0, silent_s=0.0, draining=False)


class Died(Exception):
    """What kills a Poet, and what reaches those who asked it."""

    def __init__(self, seen: Exception | None = None) -> None:
        super().__init__()
        self.seen = seen or ActorDiedError()


@dataclass
class Poet:
    """One replica: continues anything with POEM, a byte a token, so texts wait for characters.

    Behind `resume_token_ids` it goes on as if it had written them. Its finish counts its own tokens
    only, unless `counts_all`.
    """

    poem: str = POEM
    dies_after: int = 10**9
    """Chunks of a stream that it lives to send."""
    death: Exception | None = None
    """What reaches those who asked when it dies; default: Ray's error."""
    tokens_a_chunk: int = 4
    finish_apart: bool = False
    counts_all: bool = False
    error: Exception | None = None
    """What it refuses with, or the bug that it has."""
    hangs: bool = False
    """Sends its header, then waits for ever."""
    progress: Progress | None = IDLE
    """None: it does not answer."""
    asked: list[tuple[str, bytes]] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    cancelled: int = 0

    async def edge_unary(self, method: str, data: bytes, ticket: Ticket) -> Answer:
        self.asked.append((method, data))
        self.tickets.append(ticket)
        if isinstance(self.error, GptMoeError):
            return self.error
        if self.error:
            raise self.error
        if self.dies_after < 1:
            raise Died(self.death)
        if self.hangs:
            await self._for_ever()
        return messages.GenerateResponse(text=self.poem).SerializeToString()

    async def edge_stream(self, method: str, data: bytes, ticket: Ticket) -> AsyncIterator[Answers]:
        self.asked.append((method, data))
        self.tickets.append(ticket)
        if isinstance(self.error, GptMoeError):
            yield self.error
            return
        if self.error:
            raise self.error
        request = messages.GenerateRequest.FromString(data)
        request.request_id = request.request_id or ticket.holder
        for number, chunk in enumerate(self._chunks(request)):
            if number == self.dies_after:
                raise Died(self.death)
            if number and self.hangs:
                await self._for_ever()
            yield (chunk.SerializeToString(),)
            await asyncio.sleep(0)
        if self.dies_after == number + 1:
            raise Died(self.death)

    async def edge_progress(self) -> Progress:
        if self.progress is None:
            await asyncio.sleep(60)
        assert self.progress is not None
        return self.progress

    async def _for_ever(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled += 1

    def _chunks(self, request: messages.GenerateRequest) -> list[messages.GenerateChunk]:
        tokens = list(self.poem.encode())[: request.max_new_tokens or None]
        begin = len(request.resume_token_ids)
        assert tokens[:begin] == list(request.resume_token_ids), "resumed from another text"
        assert begin < len(tokens), "nothing is left to choose"
        header = messages.StreamHeader(
            request_id=request.request_id, prompt_tokens=2, model="poems"
        )
        chunks = [messages.GenerateChunk(header=header)]
        for start in range(begin, len(tokens), self.tokens_a_chunk):
            end = min(start + self.tokens_a_chunk, len(tokens))
            text = _whole(tokens[:end]).removeprefix(_whole(tokens[:start]))
            chunk = messages.GenerateChunk(text=text, token_ids=tokens[start:end])
            if request.logprobs:
                chunk.logprobs.extend(-token / 256 for token in tokens[start:end])
            if request.prompt_logprobs and start == begin:
                chunk.prompt_logprobs.extend([-1.0])
            chunks.append(chunk)
        if self.finish_apart:
            chunks.append(messages.GenerateChunk())
        chunks[-1].finish.CopyFrom(
            messages.StreamFinish(
                reason=messages.FINISH_REASON_LENGTH,
                completion_tokens=len(tokens) - (0 if self.counts_all else begin),
                timings=messages.Timings(total_s=0.001),
                cumulative_logprob=-99.0 if request.logprobs else 0.0,
            )
        )
        return chunks


def _whole(tokens: Sequence[int]) -> str:
    """The text of whole characters."""
    return bytes(tokens).decode(errors="ignore")


class Handle:
    """Hands calls to the replicas in turn, as a DeploymentHandle does: errors arrive wrapped."""

    def __init__(self, *replicas: Any) -> None:
        self.replicas = list(replicas)
        self.cancels = 0
        self._turn = 0

    def options(self, *, method_name: str, stream: bool = False) -> Any:
        return _Method(self, method_name, stream)

    def next(self) -> Any:
        self._turn += 1
        return self.replicas[(self._turn - 1) % len(self.replicas)]

    def broadcast(self, method: str) -> Any:
        return _Broadcast([getattr(replica, method) for replica in self.replicas])


@dataclass
class _Method:
    handle: Handle
    name: str
    stream: bool

    def remote(self, *arguments: Any) -> Any:
        call = getattr(self.handle.next(), self.name)(*arguments)
        return _Stream(self.handle, call) if self.stream else _Answer(self.handle, call)


class _Answer:
    def __init__(self, handle: Handle, call: Any) -> None:
        self._handle, self._task = handle, asyncio.ensure_future(call)

    def __await__(self) -> Any:
        return _as_ray_says(asyncio.shield(self._task)).__await__()

    def cancel(self) -> None:
        self._handle.cancels += 1
        self._task.cancel()


class _Stream:
    """The replica writes ahead of its reader, and goes on until somebody cancels it."""

    def __init__(self, handle: Handle, messages: AsyncIterator[bytes]) -> None:
        self._handle, self._messages = handle, messages
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._write())

    async def _write(self) -> None:
        end: Exception = StopAsyncIteration()
        try:
            async for message in self._messages:
                self._queue.put_nowait((message, None))
        except Exception as error:  # noqa: BLE001  whatever it is, it is handed on
            end = wrapped(error)
        self._queue.put_nowait((None, end))

    def __aiter__(self) -> "_Stream":
        return self

    async def __anext__(self) -> Answers:
        message, end = await self._queue.get()
        if end is not None:
            raise end
        return message

    def cancel(self) -> None:
        self._handle.cancels += 1
        self._task.cancel()


@dataclass
class _Broadcast:
    calls: list[Callable[[], Any]]

    async def _fetch_replica_results_async(self) -> list[Any]:
        if not self.calls:
            raise DeploymentUnavailableError(DeploymentID("Generator", "poems"))
        return [_Result(call) for call in self.calls]


@dataclass
class _Result:
    get_async: Callable[[], Any]


async def _as_ray_says(call: Any) -> Any:
    try:
        return await call
    except Exception as error:  # noqa: BLE001
        raise wrapped(error) from None


def wrapped(error: Exception) -> Exception:
    """As it arrives at a handle."""
    if isinstance(error, Died):
        return error.seen
    with suppress(TypeError):
        return RayTaskError("edge_stream", "a traceback", error).as_instanceof_cause()
    return error
