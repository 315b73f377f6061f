"""POST /v1/chat/completions: the next line of a talk, by a plain template.

A model that only continues text is shown the talk as one, a line for each message, and goes on
where the assistant speaks:

    系统：你是一位诗人。
    用户：写一首关于春天的诗。
    助手：

Its answer ends before a line that begins with 用户：, which is one of the request's stop strings.
"""

from typing import Annotated, Literal

import pydantic
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Tag

from gptmoe.generate.delta import Delta
from gptmoe.generate.params import MAX_STOPS, SamplingParams, check
from serve.service import Call, Service

from .answers import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    MessageDelta,
)
from .door import JsonRoute
from .fields import RequestId, StopString, Strict, Whole, by_shape, described, listed, sampled
from .logprobs import chat_logprobs
from .openai import EVENTS, REFUSALS, Head, Tally, answered, failed, finish_reason, pieces, tally_of
from .options import NAMES, Options
from .refusals import named
from .streams import answer_events, collected, together, while_connected

SPEAKERS = {"system": "系统", "developer": "系统", "user": "用户", "assistant": "助手"}

NEXT_LINE = f"\n{SPEAKERS['user']}："
"""Here a model that only continues text would speak for the user."""

MOST_STOPS = MAX_STOPS - 1
"""Stop strings of a caller's: NEXT_LINE is one too."""

Stops = Annotated[
    list[StopString], pydantic.Field(fail_fast=True, json_schema_extra={"maxItems": MOST_STOPS})
]


class TextPart(Strict):
    """A part of a message's text."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """What one side said; with the empty fields of an answer, which clients send back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("str")] | Annotated[list[TextPart], listed(1), Tag("list[dict]")],
        by_shape("a text or a list of text parts"),
    ]
    name: str | None = described(None, "Ignored.")
    refusal: None = None
    audio: None = None
    tool_calls: None = None
    function_call: None = None
    annotations: Annotated[list[None], pydantic.Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class TextFormat(Strict):
    """The only one."""

    type: Literal["text"]


class ChatBody(Options):
    """A talk so far, and how to go on. What else OpenAI's API knows is refused unless it is off."""

    messages: Annotated[list[Message], listed(1)]
    stop: StopString | Stops | None = described(None, "The answer ends before these.")
    max_completion_tokens: Whole | None = sampled(
        "max_new_tokens", None, "New tokens at most. Absent: as many as the context has room for."
    )
    max_tokens: Whole | None = sampled("max_new_tokens", None, "The same, by its older name.")
    logprobs: bool | None = described(None, "Also the log-probability of each token.")
    top_logprobs: Whole | None = sampled(
        "top_logprobs", None, "And of so many of the likeliest; only with logprobs."
    )
    parallel_tool_calls: bool | None = described(None, "Ignored: there are no tools.")
    tools: Annotated[list[None], pydantic.Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Annotated[list[None], pydantic.Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], listed(1, 1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: None = None
    web_search_options: None = None
    moderation: None = None
    add_generation_prompt: Literal[True] | None = described(
        None, "Only true: the assistant speaks next."
    )
    continue_final_message: Literal[False] | None = described(
        None, "Only false: a message that was begun is not gone on with."
    )
    chat_template: None = None

    @property
    def prompt(self) -> str:
        """The talk by the template."""
        lines = (f"{SPEAKERS[message.role]}：{message.text}\n" for message in self.messages)
        return "".join(lines) + f"{SPEAKERS['assistant']}："

    @property
    def names(self) -> dict[str, str]:
        """What this caller calls the fields of a Call."""
        most = "max_completion_tokens" if self.max_tokens is None else "max_tokens"
        return NAMES | {"prompt": "messages", "max_new_tokens": most}

    def call(self, head: Head, max_seq_len: int) -> Call:
        """Raises RequestError."""
        return Call(
            prompt=self.prompt,
            sampling=self._sampling(max_seq_len),
            request_id=head.request_id,
            named=head.named,
            seeded=self.seed is not None,
            model=self.model or "",
            priority=self.priority,
            deadline_s=self.deadline_s,
        )

    def _sampling(self, max_seq_len: int) -> SamplingParams:
        check(
            None in (self.max_tokens, self.max_completion_tokens),
            "max_tokens",
            f"{self.max_tokens} besides max_completion_tokens",
            "absent where max_completion_tokens is sent",
        )
        check(
            bool(self.logprobs) or not self.top_logprobs,
            "top_logprobs",
            f"{self.top_logprobs} without",
            "absent, or sent with logprobs=true",
        )
        given = len(self.stops)
        check(given <= MOST_STOPS, "stop", given, f"at most {MOST_STOPS} of them")
        asked = [n for n in (self.max_tokens, self.max_completion_tokens) if n is not None]
        return self.sampling(
            max_new_tokens=asked[0] if asked else max_seq_len,
            stop=(*self.stops, NEXT_LINE),
            logprobs=bool(self.logprobs),
            top_logprobs=self.top_logprobs or 0,
        )


class _Writer:
    """Writes the answers to a talk, whole or piece by piece."""

    def __init__(self, service: Service, body: ChatBody, head: Head) -> None:
        self._tokenizer = service.tokenizer
        self._body = body
        self._head = head
        self._begun: set[int] = set()

    def whole(self, answers: list[list[Delta]]) -> ChatCompletion:
        """All answers."""
        tally = tally_of(answers)
        choices = [
            ChatChoice(
                index=delta.index,
                message=AnswerMessage(content=delta.text),
                logprobs=self._logprobs(delta),
                finish_reason=finish_reason(delta) or "stop",
            )
            for delta in answers[0]
        ]
        head = self._head.fields(tally.weights_version)
        return ChatCompletion(**head, choices=choices, usage=tally.usage())

    def piece(self, place: int, delta: Delta) -> list[ChatChunk]:
        """What is new of one answer; before it, once, who speaks; after it, at the end, why."""
        parts = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            begins = MessageDelta(role="assistant", content="")
            parts.append(ChunkChoice(index=delta.index, delta=begins))
        if delta.text or self._body.logprobs:
            said = MessageDelta(content=delta.text)
            logprobs = self._logprobs(delta)
            parts.append(ChunkChoice(index=delta.index, delta=said, logprobs=logprobs))
        if reason := finish_reason(delta):
            parts.append(ChunkChoice(index=delta.index, delta=MessageDelta(), finish_reason=reason))
        head = self._head.fields(delta.version)
        return [ChatChunk(**head, choices=[part]) for part in parts]

    def close(self, tally: Tally) -> ChatChunk:
        """The numbers of tokens, after the last piece."""
        head = self._head.fields(tally.weights_version)
        return ChatChunk(**head, choices=[], usage=tally.usage())

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, delta) if self._body.logprobs else None


def router(service: Service) -> APIRouter:
    """POST /v1/chat/completions."""
    router = APIRouter(route_class=JsonRoute, responses=REFUSALS)

    @router.post(
        "/chat/completions",
        response_model=ChatCompletion,
        responses=EVENTS,
        summary="Answer in a talk",
    )
    async def chat(body: ChatBody, request: Request, x_request_id: RequestId = None) -> Response:
        head = Head.of("chatcmpl", x_request_id, service)
        with named(body.names):
            calls = [body.call(head, service.card.max_seq_len)]
            writer = _Writer(service, body, head)
            if not body.stream:
                answers = await while_connected(request.receive, collected(service, calls))
                return answered(writer.whole(answers))
            close = writer.close if body.wants_usage else None
            events = pieces(together(service, calls), writer.piece, close)
            return await answer_events(request.receive, events, failed)

    return router
