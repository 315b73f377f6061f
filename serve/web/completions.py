"""POST /v1/completions: prompts, continued."""

from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Tag

from gptmoe.generate.delta import Delta, TokenScore
from gptmoe.generate.params import check
from serve.service import Call, Service

from .answers import Completion, TextChoice
from .door import JsonRoute
from .fields import PromptText, RequestId, TokenId, Whole, by_shape, described, listed, sampled
from .logprobs import TextScores, joined
from .openai import EVENTS, REFUSALS, Head, Tally, answered, failed, finish_reason, pieces, tally_of
from .options import NAMES, Options
from .refusals import named
from .streams import answer_events, collected, together, while_connected

MAX_PROMPTS = 64

_NAMES = NAMES | {"max_new_tokens": "max_tokens", "top_logprobs": "logprobs"}

TokenIds = Annotated[list[TokenId], listed(1)]
Prompt = Annotated[
    Annotated[PromptText, Tag("str")]
    | Annotated[list[PromptText], listed(1, MAX_PROMPTS), Tag("list[str]")]
    | Annotated[TokenIds, Tag("list[int]")]
    | Annotated[list[TokenIds], listed(1, MAX_PROMPTS), Tag("list[list]")],
    by_shape("a text, its token ids, or a list of either"),
]


class CompletionBody(Options):
    """Prompts to continue, and how."""

    prompt: Prompt = pydantic.Field(
        description=f"A text, its token ids, or up to {MAX_PROMPTS} of either."
    )
    max_tokens: Whole | None = sampled(
        "max_new_tokens", 16, "New tokens at most; 0, only with echo: score the prompt.", minimum=0
    )
    logprobs: Whole | None = sampled(
        "top_logprobs",
        None,
        "Also the log-probability of each token, and of so many of the likeliest.",
    )
    echo: bool | None = described(None, "The answer begins with the prompt.")
    best_of: Whole | None = sampled(
        "num_beams", None, "Only n itself; with use_beam_search the number of beams."
    )
    suffix: Literal[""] | None = described(None, "Only empty: text is continued, not filled in.")

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """Each as a Call takes it."""
        given = self.prompt
        several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        return [one if isinstance(one, str) else tuple(one) for one in several]

    @property
    def beams(self) -> int | None:
        if self.num_beams or not self.use_beam_search:
            return self.num_beams
        return self.best_of or self.n

    def calls(self, head: Head) -> list[Call]:
        """One for each prompt. Raises RequestError."""
        n = self.n or 1
        check(
            self.best_of in (None, n) or bool(self.use_beam_search),
            "best_of",
            self.best_of,
            f"n={n} or absent: answers are not ranked; a beam search is, see num_beams",
        )
        prompt_only = bool(self.echo) and self.max_tokens == 0
        alone = "1 where max_tokens is 0: all answers would be the prompt"
        check(not prompt_only or n == 1, "n", n, alone)
        check(not prompt_only or self.beams in (None, 1), "num_beams", self.beams, alone)
        scored = bool(self.echo) and self.logprobs is not None
        check(
            not (scored and self.stream) or n == 1,
            "echo",
            f"it with logprobs in a stream of n={n}",
            "without one of these: a prompt's log-probabilities come once",
        )
        sampling = self.sampling(
            max_new_tokens=16 if self.max_tokens is None else self.max_tokens + prompt_only,
            logprobs=self.logprobs is not None,
            top_logprobs=self.logprobs or 0,
            prompt_logprobs=scored,
        )
        prompts = self.prompts
        several = [f"{head.request_id}-{place}" for place in range(len(prompts))]
        names = [head.request_id] if len(prompts) == 1 else several
        return [
            Call(
                prompt=prompt,
                sampling=sampling,
                score_only=prompt_only,
                request_id=name,
                named=head.named,
                seeded=self.seed is not None,
                model=self.model or "",
                priority=self.priority,
                deadline_s=self.deadline_s,
            )
            for name, prompt in zip(names, prompts, strict=True)
        ]


class _Writer:
    """Writes the answers to a body's calls, whole or piece by piece."""

    def __init__(self, service: Service, body: CompletionBody, head: Head) -> None:
        self._tokenizer = service.tokenizer
        self._body = body
        self._head = head
        self._prompts = body.prompts
        self._scores: dict[int, TextScores] = {}

    def whole(self, answers: list[list[Delta]]) -> Completion:
        """All answers to all prompts."""
        tally = tally_of(answers)
        choices = [
            self._choice(place, delta, deltas[0].prompt_scores)
            for place, deltas in enumerate(answers)
            for delta in deltas
        ]
        head = self._head.fields(tally.weights_version)
        return Completion(**head, choices=choices, usage=tally.usage())

    def piece(self, place: int, delta: Delta) -> list[Completion]:
        """What is new of one answer."""
        choice = self._choice(place, delta, delta.prompt_scores)
        return [Completion(**self._head.fields(delta.version), choices=[choice])]

    def close(self, tally: Tally) -> Completion:
        """The numbers of tokens, after the last piece."""
        head = self._head.fields(tally.weights_version)
        return Completion(**head, choices=[], usage=tally.usage())

    def _choice(self, place: int, delta: Delta, prompt: Sequence[TokenScore]) -> TextChoice:
        index = place * (self._body.n or 1) + delta.index
        begins = index not in self._scores
        scores = self._scores.setdefault(
            index, TextScores(self._tokenizer, self._body.logprobs or 0)
        )
        echo = self._text(place) if begins and self._body.echo else ""
        parts = []
        if echo and self._body.logprobs is not None:
            parts.append(scores.of_prompt(self._ids(place), prompt))
        if self._body.logprobs is not None:
            parts.append(scores.of_delta(delta))
        return TextChoice(
            index=index,
            text=echo + delta.text,
            logprobs=joined(parts),
            finish_reason=finish_reason(delta),
        )

    def _text(self, place: int) -> str:
        prompt = self._prompts[place]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _ids(self, place: int) -> Sequence[int]:
        prompt = self._prompts[place]
        return self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt


def router(service: Service) -> APIRouter:
    """POST /v1/completions."""
    router = APIRouter(route_class=JsonRoute, responses=REFUSALS)

    @router.post(
        "/completions", response_model=Completion, responses=EVENTS, summary="Continue prompts"
    )
    async def completions(
        body: CompletionBody, request: Request, x_request_id: RequestId = None
    ) -> Response:
        head = Head.of("cmpl", x_request_id, service)
        with named(_NAMES):
            calls = body.calls(head)
            writer = _Writer(service, body, head)
            if not body.stream:
                answers = await while_connected(request.receive, collected(service, calls))
                return answered(writer.whole(answers))
            close = writer.close if body.wants_usage else None
            events = pieces(together(service, calls), writer.piece, close)
            return await answer_events(request.receive, events, failed)

    return router
