"""A prompt in, text out: what gRPC and HTTP have in common.

Both front ends turn what they receive into a Call, and the typed errors of gptmoe.errors into their
statuses; everything between is here, once.
"""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from gptmoe.errors import DeadlineExceeded, NotFound, Unavailable
from gptmoe.generate.delta import Delta
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request, make_request
from gptmoe.text import Tokenizer

from .bridge import EngineThread


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request for text."""

    prompt: str | tuple[int, ...]
    """A text or its token ids."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    model: str = ""
    """Of what name the model must be; empty: any."""
    resume_ids: tuple[int, ...] = ()
    """What an earlier answer has said."""
    priority: int = 0
    """Lower goes first."""
    deadline_s: float | None = None
    """Seconds from now after which nobody wants the answer."""
    transport: str = ""
    """How it came: "grpc" or "http"; for the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """All that a Call brought."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    logprobs: tuple[float, ...] = ()
    weights_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What a caller may know of the model."""

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


class Service:
    """One model and its running engine."""

    def __init__(self, engine: EngineThread, tokenizer: Tokenizer, card: ModelCard) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self.card = card
        self.draining = False
        """New requests are refused; running ones go on."""

    async def stream(self, call: Call) -> AsyncGenerator[Delta, None]:
        """Yield the deltas of the call; errors and leaving early as in EngineThread.stream.

        Raises Unavailable while `draining`.
        """
        if self.draining:
            raise Unavailable(
                f"{self.card.name} takes no new requests: an operator drains it; ask another server"
            )
        request = self._request(call)
        async with aclosing(self._engine.stream(request)) as deltas:
            async for delta in deltas:
                yield delta

    def _request(self, call: Call) -> Request:
        if call.model not in ("", self.card.name):
            raise NotFound(f"model {call.model!r} is not served here; {self.card.name!r} is")
        deadline_s = call.deadline_s
        if deadline_s is not None and deadline_s <= 0:
            raise DeadlineExceeded("the deadline has passed before the request arrived")
        return make_request(
            self._tokenizer,
            self.card.max_seq_len,
            call.request_id,
            call.prompt,
            call.sampling,
            resume_ids=call.resume_ids,
            priority=call.priority,
            deadline_s=None if deadline_s is None else time.monotonic() + deadline_s,
        )

    async def complete(self, call: Call) -> Completion:
        """The whole text of the call; errors as in `stream`."""
        async with aclosing(self.stream(call)) as stream:
            deltas = [delta async for delta in stream]
        return Completion(
            request_id=call.request_id,
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token for delta in deltas for token in delta.token_ids),
            finish_reason=deltas[-1].finish_reason,
            prompt_tokens=deltas[-1].prompt_tokens,
            logprobs=tuple(value for delta in deltas for value in delta.logprobs),
            weights_version=deltas[-1].version,
        )

    def check(self, stall_s: float) -> None:
        """Raise ClusterError unless the engine is alive and goes on (see EngineThread.check)."""
        self._engine.check(stall_s)

    def stop(self) -> None:
        """Stop the engine's thread."""
        self._engine.stop()
