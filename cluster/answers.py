"""What a client of the service Generation asks for and gets, or gets told, as plain data.

Messages come here to be read; which module they are from need not be known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

TopLogprobs = tuple[tuple[int, float], ...]
"""The likeliest tokens at one place with their log-probabilities, likeliest first."""


RETRY_AFTER = "grpc-retry-pushback-ms"
"""The trailing metadata in which a server says, in milliseconds, when to come again.

https://github.com/grpc/proposal/blob/master/A6-client-retries.md#pushback
"""


class GenerationError(Exception):
    """A call failed: `code` is gRPC's name for the kind (INVALID_ARGUMENT, ...).

    `retry_after_s`: seconds after which the server wants to be asked again; None if it did not say.
    """

    def __init__(self, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(code, message, retry_after_s)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class Sampling(TypedDict, total=False):
    """What a call may ask for; what is absent has the server's default."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    n: int
    num_beams: int
    num_beam_groups: int
    diversity_penalty: float
    length_penalty: float
    max_new_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_end: bool
    logprobs: bool
    top_logprobs: int
    prompt_logprobs: bool
    request_id: str
    model: str
    resume_token_ids: Sequence[int]
    deadline_ms: int
    priority: int


class ScoreOptions(TypedDict, total=False):
    """What a call of `score` may say besides."""

    model: str
    deadline_ms: int
    priority: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds from arrival, by the server's clock."""

    queue_s: float = 0.0
    """To the first step."""
    first_token_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of n answers."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()
    cumulative_logprob: float = 0.0
    """The sum of the tokens' log-probabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A whole answer; `text` is without the prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """"stop", "length" or "abort"."""
    prompt_tokens: int
    completion_tokens: int
    """Of all choices."""
    request_id: str
    logprobs: tuple[float, ...] = ()
    """Natural logarithms, one a token, if asked for."""
    weights_version: int = 0
    """Of the weights that chose the last token: one more for each refresh."""
    choices: tuple[Choice, ...] = ()
    """All n answers; what is above is of the first."""
    prompt_logprobs: tuple[float, ...] = ()
    """Of the prompt's tokens but the first, if asked for."""
    timings: Timings = Timings()
    cached_tokens: int = 0
    """Of the prompt: not computed again."""
    model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of an answer; `finish_reason` is empty until the last one of its index."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    request_id: str
    logprobs: tuple[float, ...] = ()
    weights_version: int = 0
    """Of the last one, as all that follow `top_logprobs`."""
    index: int = 0
    """Which of n answers."""
    model: str = ""
    prompt_logprobs: tuple[float, ...] = ()
    """With the first tokens of index 0."""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    completion_tokens: int = 0
    """Of this index."""
    timings: Timings = Timings()
    cached_tokens: int = 0
    cumulative_logprob: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """How likely a continuation is."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of each token behind the prompt and those before it."""
    logprob: float
    """Their sum."""
    greedy: bool
    """Whether each is the likeliest at its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A text as the model reads it."""

    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    """What each token says; a part of a character shows as U+FFFD."""


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


def failure(error: Any) -> GenerationError:
    """From a grpc.RpcError."""
    said = {key: value for key, value in error.trailing_metadata() or () if key == RETRY_AFTER}
    wait_ms = str(said.get(RETRY_AFTER, ""))
    retry_after_s = int(wait_ms) / 1000 if wait_ms.isdecimal() else None
    return GenerationError(error.code().name, error.details() or "", retry_after_s)


def generation(message: Any) -> Generation:
    """From a GenerateResponse."""
    return Generation(
        **_read(Generation, message, "finish_reason", "choices", "timings"),
        finish_reason=_reason(message, "finish_reason"),
        choices=tuple(_choice(choice) for choice in message.choices),
        timings=_timings(message.timings),
    )


def chunk(message: Any, header: Any) -> Chunk:
    """From a GenerateChunk, and the StreamHeader that came before it."""
    finish = message.finish
    return Chunk(
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=_reason(finish, "reason"),
        prompt_tokens=header.prompt_tokens,
        request_id=header.request_id,
        logprobs=tuple(message.logprobs),
        weights_version=finish.weights_version,
        index=message.index,
        model=header.model,
        prompt_logprobs=tuple(message.prompt_logprobs),
        top_logprobs=_places(message.top_logprobs),
        completion_tokens=finish.completion_tokens,
        timings=_timings(finish.timings),
        cached_tokens=finish.cached_tokens,
        cumulative_logprob=finish.cumulative_logprob,
    )


def scores(message: Any) -> tuple[Scored, ...]:
    """From a ScoreResponse."""
    return tuple(Scored(**_read(Scored, score)) for score in message.scores)


def tokens(message: Any) -> Tokens:
    """From a TokenizeResponse."""
    return Tokens(token_ids=tuple(message.token_ids), texts=tuple(message.tokens))


def model(message: Any) -> Model:
    """From a ModelInfo."""
    return Model(**_read(Model, message))


def _choice(message: Any) -> Choice:
    return Choice(
        **_read(Choice, message, "finish_reason", "top_logprobs"),
        finish_reason=_reason(message, "finish_reason"),
        top_logprobs=_places(message.top_logprobs),
    )


def _read(kind: Any, message: Any, *but: str) -> dict[str, Any]:
    """The fields of a dataclass from those of the same names."""
    names = [field.name for field in fields(kind) if field.name not in but]
    repeated = {field.name for field in message.DESCRIPTOR.fields if field.is_repeated}
    values = {name: getattr(message, name) for name in names}
    return {name: tuple(it) if name in repeated else it for name, it in values.items()}


def _places(messages: Any) -> tuple[TopLogprobs, ...]:
    return tuple(tuple(zip(it.token_ids, it.logprobs, strict=True)) for it in messages)


def _timings(message: Any) -> Timings:
    return Timings(**_read(Timings, message))


def _reason(message: Any, field: str) -> str:
    """ "stop", "length" or "abort"; empty for what has not finished."""
    value = getattr(message, field)
    known = message.DESCRIPTOR.fields_by_name[field].enum_type.values_by_number
    name = str(known[value].name) if value in known else ""
    return "" if value == 0 else name.removeprefix("FINISH_REASON_").lower()
