"""A prompt in, text out: what gRPC and HTTP have in common.

Both front ends turn what they receive into a Call, and the typed errors of gptmoe.errors into their
statuses; everything between is here, once.
"""

import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from gptmoe.errors import Unavailable
from gptmoe.generate.engine import Delta
from gptmoe.generate.request import SamplingParams, make_request

from .bridge import EngineThread


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request for text."""

    prompt: str
    sampling: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)


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

    def __init__(
        self, engine: EngineThread, encode: Callable[[str], Sequence[int]], card: ModelCard
    ) -> None:
        self._engine = engine
        self._encode = encode
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
        request = make_request(
            self._encode, self.card.max_seq_len, call.request_id, call.prompt, call.sampling
        )
        async with aclosing(self._engine.stream(request)) as deltas:
            async for delta in deltas:
                yield delta

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
