"""How likely continuations are that a caller gives: what to ask the engine, and its answer.

A continuation is tokenized apart and appended to the prompt's tokens. So all continuations stand
behind the same tokens: their scores compare, the border between prompt and continuation is exact,
and the prompt is computed once. The limit: where the tokenizer would have joined the end of the
prompt and the start of the continuation into one token, the sequence that is scored is not the one
that the joined text has. Break where words end to have them equal.
"""

import math
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gptmoe.errors import RequestError
from gptmoe.generate.delta import Delta
from gptmoe.generate.params import SamplingParams, check
from gptmoe.generate.request import MAX_CHARACTERS_A_TOKEN, Request, make_request
from gptmoe.text import Tokenizer

from .names import ALONE, Ticket

MAX_CONTINUATIONS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreCall:
    """One prompt, and what may stand behind it."""

    prompt: str
    continuations: tuple[str, ...]
    model: str = ""
    """Of what name the model must be; empty: any."""
    ticket: Ticket = ALONE
    """Tells one that goes on elsewhere from a new one."""
    priority: int = 0
    deadline_s: float | None = None
    """Seconds from now after which nobody wants the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One continuation."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of each token behind the prompt and those before it."""
    logprob: float
    """Their sum."""
    greedy: bool
    """Whether each is the likeliest at its place."""


def score_requests(
    tokenizer: Tokenizer, max_seq_len: int, call: ScoreCall, deadline_s: float | None
) -> tuple[Request, ...]:
    """One request for each continuation; `deadline_s` by the engine's clock.

    Raises RequestError for no continuations, too many, an empty one, or one without room.
    """
    count = len(call.continuations)
    wanted = f"1 to {MAX_CONTINUATIONS} texts"
    check(1 <= count <= MAX_CONTINUATIONS, "continuations", f"{count}", wanted)
    name = uuid.uuid4().hex
    sampling = SamplingParams(max_new_tokens=1)
    prompt = make_request(
        tokenizer,
        max_seq_len,
        name,
        call.prompt,
        sampling,
        priority=call.priority,
        deadline_s=deadline_s,
    )
    start = len(prompt.prompt_ids)
    requests = []
    for number, text in enumerate(call.continuations):
        ids = _encoded(tokenizer, max_seq_len - start, number, text)
        requests.append(
            replace(
                prompt,
                request_id=f"{name}-{number}",
                prompt_ids=prompt.prompt_ids + ids,
                score_from=start,
                score_only=True,
            )
        )
    return tuple(requests)


def scored(request: Request, deltas: Iterable[Delta]) -> Scored:
    """What the engine said of a request of `score_requests`."""
    scores = tuple(score for delta in deltas for score in delta.prompt_scores)
    return Scored(
        token_ids=request.prompt_ids[request.score_from :],
        logprobs=tuple(score.logprob for score in scores),
        logprob=math.fsum(score.logprob for score in scores),
        greedy=all(score.greedy for score in scores),
    )


def _encoded(tokenizer: Tokenizer, room: int, number: int, text: str) -> tuple[int, ...]:
    """The tokens of a continuation that has room for fewer than `room`."""
    field, name = "continuations", f"continuations[{number}]"
    if not text:
        raise RequestError(f"{name} must be at least one character; found an empty text", field)
    count = f"{len(text)} characters"
    if len(text) <= MAX_CHARACTERS_A_TOKEN * room:
        ids = tuple(tokenizer.encode(text))
        if len(ids) < room:
            return ids
        count = f"{len(ids)} tokens"
    raise RequestError(
        f"{name} must be at most {room - 1} tokens, what the context has left behind this prompt; "
        f"found {count}",
        field,
    )
