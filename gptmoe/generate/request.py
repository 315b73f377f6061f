"""What one request asks for, checked where it enters. No torch."""

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gptmoe.errors import RequestError

MAX_STOP_STRINGS = 16
MAX_CHARACTERS_A_TOKEN = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to pick tokens and when to stop."""

    temperature: float = 1.0
    """0 means greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 = all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    repetition_penalty: float = 1.0
    """Divides the scores of tokens already present (arXiv 1909.05858, section 4.1); 1 = off."""
    seed: int = 0
    """The noise of a token is a function of (seed, position) alone."""
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    ignore_end: bool = False
    """Go on after the model's end token (for measurements)."""
    logprobs: bool = False
    """Report each token's log-probability under the model, before penalty and temperature."""

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            self._check_type(name, numbers.Real, "a number")
        for name in ("top_k", "seed", "max_new_tokens"):
            self._check_type(name, numbers.Integral, "a whole number")
        for name in ("ignore_end", "logprobs"):
            self._check_type(name, bool, "true or false")
        strings = isinstance(self.stop, tuple) and all(isinstance(s, str) for s in self.stop)
        _check(strings, "stop", repr(self.stop), "a tuple of strings")
        for name, good, wanted in (
            ("temperature", 0 <= self.temperature <= 100, "between 0 (greedy) and 100"),
            ("top_k", self.top_k >= 0, "at least 0 (0 = all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            (
                "repetition_penalty",
                0 < self.repetition_penalty <= 100,
                "above 0 and at most 100 (1 = off)",
            ),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("seed", -(2**63) <= self.seed < 2**63, "a 64-bit whole number"),
        ):
            _check(good, name, getattr(self, name), wanted)
        count = len(self.stop)
        _check(count <= MAX_STOP_STRINGS, "stop", f"{count} strings", f"at most {MAX_STOP_STRINGS}")
        _check(all(self.stop), "stop", "an empty string", "strings of at least one character")

    def _check_type(self, name: str, kind: type, wanted: str) -> None:
        value = getattr(self, name)
        good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        _check(good, name, repr(value), wanted)

    @property
    def greedy(self) -> bool:
        """True if no noise is involved."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams


def make_request(
    encode: Callable[[str], Sequence[int]],
    max_seq_len: int,
    request_id: str,
    prompt: str,
    sampling: SamplingParams,
) -> Request:
    """Tokenize and check a prompt. Raises RequestError for an empty, malformed or too long one."""
    _check(isinstance(prompt, str), "prompt", repr(prompt), "a text")
    _check(prompt != "", "prompt", "an empty text", "at least one character")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(
            "prompt is not valid Unicode text; send UTF-8 without lone surrogates", "prompt"
        ) from None
    # No text is that long in so few tokens: a book is refused before it is encoded.
    shorter = len(prompt) <= MAX_CHARACTERS_A_TOKEN * max_seq_len
    _check(shorter, "prompt", f"{len(prompt)} characters", _shorter(max_seq_len))
    ids = tuple(encode(prompt))
    _check(len(ids) < max_seq_len, "prompt", f"{len(ids)} tokens", _shorter(max_seq_len))
    return Request(request_id, ids, sampling)


def _shorter(max_seq_len: int) -> str:
    most = max_seq_len - 1
    return f"at most {most} tokens, to leave room for one more in the context of {max_seq_len}"


def _check(good: bool, field: str, found: object, wanted: str) -> None:
    if not good:
        raise RequestError(f"{field} must be {wanted}; found {found}", field)
