"""What is answered, in the shapes of OpenAI's API, and how a refusal looks. Data only."""

from typing import Any, Literal

import pydantic

FinishReason = Literal["stop", "length", "abort"]
"""`abort`: an operator ended the request."""


class Model(pydantic.BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gptmoe"


class Models(pydantic.BaseModel):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class CachedTokens(pydantic.BaseModel):
    """Prompt tokens that were found in the cache."""

    cached_tokens: int


class Usage(pydantic.BaseModel):
    """Numbers of tokens. A prompt counts once, whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TextLogprobs(pydantic.BaseModel):
    """Of each token; `null` for the first token of a prompt, which nothing comes before."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(pydantic.BaseModel):
    """One answer of a completion, or a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None


class Completion(pydantic.BaseModel):
    """The answers to prompts; in a stream, pieces of them."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | None = None


class TopToken(pydantic.BaseModel):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TopToken):
    """One token of an answer."""

    top_logprobs: list[TopToken]


class ChatLogprobs(pydantic.BaseModel):
    """Of each token of an answer."""

    content: list[ChatToken]
    refusal: None = None


class AnswerMessage(pydantic.BaseModel):
    """What the assistant says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(pydantic.BaseModel):
    """One answer of a chat."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(pydantic.BaseModel):
    """The answers to a chat."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class MessageDelta(pydantic.BaseModel):
    """What is new of a message: its role comes first."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @pydantic.model_serializer
    def _given(self) -> dict[str, str]:
        parts = {"role": self.role, "content": self.content}
        return {name: part for name, part in parts.items() if part is not None}


class ChunkChoice(pydantic.BaseModel):
    """A piece of one answer of a chat."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(pydantic.BaseModel):
    """Pieces of the answers to a chat."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class OpenAIError(pydantic.BaseModel):
    """Why a request is refused."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIRefusal(pydantic.BaseModel):
    """A refusal in OpenAI's shape."""

    error: OpenAIError


class PlainError(pydantic.BaseModel):
    """Why a request is refused, and what to change."""

    message: str
    field: str


class PlainRefusal(pydantic.BaseModel):
    """A refusal."""

    error: PlainError


EVENT_CONTENT: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "properties": {"data": {"type": "string"}},
            "required": ["data"],
        }
    }
}
"""Server-sent events in a schema, as OpenAPI 3.2 has them."""

RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
BEARER = {"WWW-Authenticate": {"schema": {"type": "string"}, "description": "Bearer."}}
ONCE = {
    "x-should-retry": {
        "schema": {"type": "string", "enum": ["false"]},
        "description": "OpenAI's clients do not send it again by themselves.",
    }
}

_REASONS: dict[int, tuple[str, dict[str, Any]]] = {
    400: ("The body is not a request, or a field is out of range: it is named.", {}),
    401: ("The key is missing or wrong.", BEARER),
    404: ("No model of that name is served.", {}),
    408: ("The deadline passed; without the header: the body did not arrive in time.", ONCE),
    409: ("A request with that id runs.", ONCE),
    413: ("The body is too large.", {}),
    415: ("The body is not application/json.", {}),
    429: ("The queue is full.", RETRY),
    503: ("The model is away for now.", RETRY),
}


def refusals(model: type[pydantic.BaseModel], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """What routes say of these refusals in the schema; without statuses: all."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses or _REASONS:
        reason, headers = _REASONS[status]
        found[status] = {"model": model, "description": reason, "headers": headers}
    return found
