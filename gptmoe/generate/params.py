"""How to pick tokens and when to stop, checked where it enters. No torch."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from gptmoe.errors import RequestError

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_ANSWERS = 16
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BIAS = 100
MAX_FOUND_CHARACTERS = 80

_ABOVE_0 = math.ulp(0.0)

_NUMBERS = {
    "temperature": (0, 100, "between 0 (greedy) and 100"),
    "top_p": (_ABOVE_0, 1, "above 0 and at most 1"),
    "min_p": (0, 1, "between 0 (off) and 1"),
    "repetition_penalty": (_ABOVE_0, 100, "above 0 and at most 100 (1 = off)"),
    "presence_penalty": (-100, 100, "between -100 and 100 (0 = off)"),
    "frequency_penalty": (-100, 100, "between -100 and 100 (0 = off)"),
    "diversity_penalty": (0, 1e6, "between 0 (off) and 1000000"),
    # More would take length ** length_penalty out of the range of floats.
    "length_penalty": (-10, 10, "between -10 and 10 (0 = off)"),
}
_WHOLE = {
    "top_k": (0, math.inf, "at least 0 (0 = all tokens)"),
    "seed": (-(2**63), 2**63 - 1, "a 64-bit whole number"),
    "n": (1, MAX_ANSWERS, f"between 1 and {MAX_ANSWERS}"),
    "num_beams": (1, MAX_ANSWERS, f"between 1 (no search) and {MAX_ANSWERS}"),
    "num_beam_groups": (1, MAX_ANSWERS, f"between 1 and {MAX_ANSWERS}"),
    "max_new_tokens": (1, math.inf, "at least 1"),
    "top_logprobs": (0, MAX_TOP_LOGPROBS, f"between 0 and {MAX_TOP_LOGPROBS}"),
}
_SWITCHES = ("ignore_end", "logprobs", "prompt_logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to pick tokens and when to stop."""

    temperature: float = 1.0
    """0 means greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 = all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    min_p: float = 0.0
    """Keep tokens at least this likely, as a part of the likeliest one's probability
    (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides the scores of tokens already present, the prompt's too (arXiv 1909.05858, section
    4.1); 1 = off."""
    presence_penalty: float = 0.0
    """Taken from the scores of tokens generated already."""
    frequency_penalty: float = 0.0
    """The same, times how often they were generated."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its score) pairs."""
    seed: int = 0
    """The noise of a token is a function of (seed, index of the answer, position) alone."""
    n: int = 1
    """Answers to the same prompt."""
    num_beams: int = 1
    """Beams of a beam search, of which the best n are answered; 1: no search. Greedy only."""
    num_beam_groups: int = 1
    """Groups of beams that shall differ (diverse beam search, arXiv 1610.02424)."""
    diversity_penalty: float = 0.0
    """What a token costs for each beam of earlier groups that chose it in the same step."""
    length_penalty: float = 1.0
    """Beams are compared by log-probability / length ** length_penalty; the length is that of the
    answer in tokens, its end token too."""
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    stop_token_ids: tuple[int, ...] = ()
    """The text ends before the first of these, as before the model's own end token."""
    ignore_end: bool = False
    """Go on after the model's end token (for measurements)."""
    logprobs: bool = False
    """Report each token's log-probability under the model, before penalties and temperature."""
    top_logprobs: int = 0
    """And those of so many of the likeliest tokens at each place."""
    prompt_logprobs: bool = False
    """And those of the prompt's tokens, with the likeliest at their places."""

    def __post_init__(self) -> None:
        for name, (least, most, wanted) in _NUMBERS.items():
            value = getattr(self, name)
            check(_is_number(value, numbers.Real), name, shown(value), "a number")
            check(least <= value <= most, name, shown(value), wanted)
            object.__setattr__(self, name, float(value))  # equal parameters, equal bytes
        for name, (least, most, wanted) in _WHOLE.items():
            value = getattr(self, name)
            check(_is_number(value, numbers.Integral), name, shown(value), "a whole number")
            check(-(2**63) <= value < 2**63, name, shown(value), "a 64-bit whole number")
            check(least <= value <= most, name, shown(value), wanted)
            object.__setattr__(self, name, int(value))
        for name in _SWITCHES:
            value = getattr(self, name)
            check(isinstance(value, bool), name, shown(value), "true or false")
        self._check_stops()
        self._check_biases()
        self._check_answers()

    def _check_stops(self) -> None:
        self._check_tuple("stop", str, "a tuple of strings")
        for text in self.stop:
            check(text != "", "stop", "an empty string", "strings of at least one character")
            wanted = f"strings of at most {MAX_STOP_CHARACTERS} characters"
            check(len(text) <= MAX_STOP_CHARACTERS, "stop", f"one of {len(text)}", wanted)
            check(is_unicode(text), "stop", shown(text), "valid Unicode without lone surrogates")
        self._check_tuple("stop_token_ids", int, "a tuple of token ids")
        least = min(self.stop_token_ids, default=0)
        check(least >= 0, "stop_token_ids", shown(least), "token ids of at least 0")

    def _check_tuple(self, name: str, kind: type, wanted: str) -> None:
        value = getattr(self, name)
        good = isinstance(value, tuple) and all(type(item) is kind for item in value)
        check(good, name, shown(value), wanted)
        check(len(value) <= MAX_STOPS, name, len(value), f"at most {MAX_STOPS} of them")

    def _check_biases(self) -> None:
        pairs, name = self.logit_bias, "logit_bias"
        good = isinstance(pairs, tuple) and all(
            isinstance(pair, tuple) and len(pair) == 2 for pair in pairs
        )
        check(good, name, shown(pairs), "pairs of a token id and a number")
        check(len(pairs) <= MAX_BIASES, name, len(pairs), f"at most {MAX_BIASES} tokens")
        for token, bias in pairs:
            good = type(token) is int and token >= 0
            check(good, name, shown(token), "of token ids of at least 0")
            good = _is_number(bias, numbers.Real) and -MAX_BIAS <= bias <= MAX_BIAS
            check(good, name, shown(bias), f"of numbers between -{MAX_BIAS} and {MAX_BIAS}")
        tokens = [token for token, _ in pairs]
        check(len(set(tokens)) == len(tokens), name, "a token twice", "one number a token")

    def _check_answers(self) -> None:
        beams, groups = self.num_beams, self.num_beam_groups
        if beams > 1:
            check(self.greedy, "num_beams", beams, "1 unless temperature is 0: beams are not drawn")
            check(self.n <= beams, "n", self.n, f"at most num_beams={beams}")
            check(beams % groups == 0, "num_beam_groups", groups, f"a divisor of num_beams={beams}")
        else:
            check(groups == 1, "num_beam_groups", groups, "1 without num_beams")
            wanted = "1 where temperature is 0 and num_beams is 1: all answers would be the same"
            check(self.n == 1 or not self.greedy, "n", self.n, wanted)

    @property
    def greedy(self) -> bool:
        """True if no noise is involved."""
        return self.temperature == 0


def as_params(given: Mapping[str, object]) -> SamplingParams:
    """From keywords as people write them: one stop string, lists, a mapping of biases.

    Raises RequestError for an unknown name or a value out of range.
    """
    known = SamplingParams.__dataclass_fields__
    for name in given:
        if name not in known:
            raise RequestError(
                f"unknown sampling parameter {name}; known: {', '.join(known)}", name
            )
    values: dict[str, Any] = dict(given)
    for name in ("stop", "stop_token_ids"):
        value = values.get(name, ())
        if isinstance(value, str | int):
            values[name] = (value,)
        elif isinstance(value, Sequence):
            values[name] = tuple(value)
    bias = values.get("logit_bias")
    if isinstance(bias, Mapping):
        values["logit_bias"] = biases(bias)
    return SamplingParams(**values)


def biases(given: Mapping[Any, float]) -> tuple[tuple[int, float], ...]:
    """A mapping from token to bias as SamplingParams takes it, by token.

    A token may be written as a string of digits, as JSON's keys are. Raises RequestError for
    others.
    """
    return tuple(sorted(((_token(key), bias) for key, bias in given.items()), key=itemgetter(0)))


def bounds(name: str) -> tuple[float, float]:
    """The least and the most that a field of SamplingParams that is a number may be.

    Infinite: no bound. The least that is `math.ulp(0.0)`: anything above 0.
    """
    least, most, _ = (_NUMBERS | _WHOLE)[name]
    return least, most


def check(good: bool, field: str, found: object, wanted: str) -> None:
    """Raise RequestError about `field` unless `good`."""
    if not good:
        raise RequestError(f"{field} must be {wanted}; found {found}", field)


def shown(value: object) -> str:
    """A value that somebody sent, short enough for a message."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write whole numbers of more than 4,300 digits
        return "a number of thousands of digits"
    most = MAX_FOUND_CHARACTERS
    return text if len(text) <= most else f"{text[: most - 3]}..."


def check_text(prompt: str) -> None:
    """Raise RequestError for a prompt that is empty, or no Unicode text."""
    check(prompt != "", "prompt", "an empty text", "at least one character")
    if not is_unicode(prompt):
        raise RequestError(
            "prompt is not valid Unicode text; send UTF-8 without lone surrogates", "prompt"
        )


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can write it; a lone surrogate it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _token(key: object) -> int:
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20:
        return int(key)
    if isinstance(key, int) and not isinstance(key, bool):
        return key
    raise RequestError(f"logit_bias must be of token ids; found {shown(key)}", "logit_bias")
