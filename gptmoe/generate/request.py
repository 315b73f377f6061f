"""One prompt to continue, checked where it enters. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from gptmoe.text import Tokenizer

from .output import TextStream, end_ids
from .params import SamplingParams, check, check_text, shown

MAX_CHARACTERS_A_TOKEN = 64
MAX_ID_CHARACTERS = 200
MOST_PRIORITY = 100


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue, or to score."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    resume_ids: tuple[int, ...] = ()
    """What an earlier answer has said already: this one goes on behind it, as if it had."""
    priority: int = 0
    """Lower goes first; a step of 1 is worth PRIORITY_S seconds of waiting."""
    deadline_s: float | None = None
    """By the engine's clock: then it ends, whatever it has said."""
    score_from: int = 0
    """Score the prompt's tokens from this place on (at least 1); 0: none."""
    score_only: bool = False
    """Generate nothing."""


def make_request(
    tokenizer: Tokenizer,
    max_seq_len: int,
    request_id: str,
    prompt: str | Sequence[int],
    sampling: SamplingParams,
    *,
    resume_ids: Sequence[int] = (),
    priority: int = 0,
    deadline_s: float | None = None,
    score_only: bool = False,
) -> Request:
    """Tokenize and check a prompt: a text or its token ids.

    The context's rule: a prompt that leaves no room for one token is refused, and an answer ends
    where the context is full, with finish_reason "length". Raises RequestError.
    """
    check(len(request_id) <= MAX_ID_CHARACTERS, "request_id", f"{len(request_id)} characters",
          f"at most {MAX_ID_CHARACTERS} characters")  # fmt: skip
    whole = isinstance(priority, int) and not isinstance(priority, bool)
    wanted = f"a whole number between -{MOST_PRIORITY} and {MOST_PRIORITY}"
    good = whole and -MOST_PRIORITY <= priority <= MOST_PRIORITY
    check(good, "priority", shown(priority), wanted)
    ids = tuple(_encoded(tokenizer, prompt, max_seq_len) if isinstance(prompt, str) else prompt)
    check(len(ids) > 0, "prompt", "no tokens", "at least one token")
    check(len(ids) < max_seq_len, "prompt", f"{len(ids)} tokens", _shorter(max_seq_len))
    _check_tokens("prompt_token_ids", ids, tokenizer)
    _check_tokens("stop_token_ids", sampling.stop_token_ids, tokenizer)
    _check_tokens("logit_bias", [token for token, _ in sampling.logit_bias], tokenizer)
    if resume_ids:
        room = min(sampling.max_new_tokens, max_seq_len - len(ids))
        _check_resumed(tokenizer, resume_ids, sampling, room)
    return Request(
        request_id,
        ids,
        sampling,
        resume_ids=tuple(resume_ids),
        priority=priority,
        deadline_s=deadline_s,
        score_from=1 if sampling.prompt_logprobs else 0,
        score_only=score_only,
    )


def _encoded(tokenizer: Tokenizer, prompt: str, max_seq_len: int) -> list[int]:
    check_text(prompt)
    # No text is that long in so few tokens: a book is refused before it is encoded.
    shorter = len(prompt) <= MAX_CHARACTERS_A_TOKEN * max_seq_len
    check(shorter, "prompt", f"{len(prompt)} characters", _shorter(max_seq_len))
    return tokenizer.encode(prompt)


def _check_resumed(
    tokenizer: Tokenizer, resume_ids: Sequence[int], sampling: SamplingParams, room: int
) -> None:
    """An answer goes on only behind tokens that have not ended it."""
    field = "resume_token_ids"
    one = sampling.n == 1 and sampling.num_beams == 1
    check(one, field, "tokens", "empty with n or num_beams above 1")
    found = f"{len(resume_ids)} tokens"
    wanted = "fewer than max_new_tokens and what the context has room for"
    check(len(resume_ids) < room, field, found, f"{wanted}: {room}")
    _check_tokens(field, resume_ids, tokenizer)
    ends = end_ids(tokenizer, sampling).intersection(resume_ids)
    wanted = "those of an answer that has not ended"
    check(not ends, field, f"the end token {min(ends, default=0)}", wanted)
    stopped = TextStream(tokenizer, sampling.stop, resume_ids).stopped
    check(not stopped, field, "a whole stop string", wanted)


def _check_tokens(field: str, ids: Sequence[int], tokenizer: Tokenizer) -> None:
    most = tokenizer.vocab_size - 1
    wrong = [token for token in ids if type(token) is not int or not 0 <= token <= most]
    check(not wrong, field, shown(wrong[:1]), f"token ids from 0 to {most}")


def _shorter(max_seq_len: int) -> str:
    most = max_seq_len - 1
    return f"at most {most} tokens, to leave room for one more in the context of {max_seq_len}"
