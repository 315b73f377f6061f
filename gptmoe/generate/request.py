"""One prompt to continue, checked where it enters. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from gptmoe.errors import RequestError
from gptmoe.text import Tokenizer

from .params import SamplingParams, check

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
) -> Request:
    """Tokenize and check a prompt: a text or its token ids.

    The context's rule: a prompt that leaves no room for one token is refused, and an answer ends
    where the context is full, with finish_reason "length". Raises RequestError.
    """
    check(len(request_id) <= MAX_ID_CHARACTERS, "request_id", f"{len(request_id)} characters",
          f"at most {MAX_ID_CHARACTERS} characters")  # fmt: skip
    wanted = f"between -{MOST_PRIORITY} and {MOST_PRIORITY}"
    check(-MOST_PRIORITY <= priority <= MOST_PRIORITY, "priority", priority, wanted)
    ids = tuple(_encoded(tokenizer, prompt, max_seq_len) if isinstance(prompt, str) else prompt)
    vocab_size = tokenizer.vocab_size
    _check_tokens("prompt_token_ids", ids, vocab_size)
    _check_tokens("resume_token_ids", resume_ids, vocab_size)
    _check_tokens("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_tokens("logit_bias", [token for token, _ in sampling.logit_bias], vocab_size)
    check(len(ids) > 0, "prompt", "no tokens", "at least one token")
    check(len(ids) < max_seq_len, "prompt", f"{len(ids)} tokens", _shorter(max_seq_len))
    check(
        len(resume_ids) < min(sampling.max_new_tokens, max_seq_len - len(ids)),
        "resume_token_ids",
        f"{len(resume_ids)} tokens",
        f"fewer than max_new_tokens={sampling.max_new_tokens} and what the context has room for",
    )
    one = sampling.n == 1 and sampling.num_beams == 1
    check(one or not resume_ids, "resume_token_ids", "tokens", "empty with n or num_beams above 1")
    return Request(
        request_id,
        ids,
        sampling,
        resume_ids=tuple(resume_ids),
        priority=priority,
        deadline_s=deadline_s,
        score_from=1 if sampling.prompt_logprobs else 0,
    )


def _encoded(tokenizer: Tokenizer, prompt: str, max_seq_len: int) -> list[int]:
    check(prompt != "", "prompt", "an empty text", "at least one character")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(
            "prompt is not valid Unicode text; send UTF-8 without lone surrogates", "prompt"
        ) from None
    # No text is that long in so few tokens: a book is refused before it is encoded.
    shorter = len(prompt) <= MAX_CHARACTERS_A_TOKEN * max_seq_len
    check(shorter, "prompt", f"{len(prompt)} characters", _shorter(max_seq_len))
    return tokenizer.encode(prompt)


def _check_tokens(field: str, ids: Sequence[int], vocab_size: int) -> None:
    wrong = [token for token in ids if not 0 <= token < vocab_size]
    check(not wrong, field, wrong[:1], f"token ids from 0 to {vocab_size - 1}")


def _shorter(max_seq_len: int) -> str:
    most = max_seq_len - 1
    return f"at most {most} tokens, to leave room for one more in the context of {max_seq_len}"
