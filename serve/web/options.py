"""What completions and chats have in common: how to sample, and the request itself."""

from typing import Annotated, Any, Literal

import pydantic

from gptmoe.generate.params import (
    MAX_BIASES,
    SamplingParams,
    biases,
    check,
)

from .fields import (
    DEADLINE,
    PRIORITY,
    Biases,
    Milliseconds,
    StopString,
    StopStrings,
    StopTokens,
    Strict,
    Whole,
    described,
    sampled,
)

_SAME = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "length_penalty", "diversity_penalty", "seed", "n", "num_beams", "num_beam_groups",
)  # fmt: skip
"""Called as in SamplingParams; absent: its default."""

NAMES = {
    "ignore_end": "ignore_eos",
    "prompt_token_ids": "prompt",
    "request_id": "X-Request-Id",
}
"""What OpenAI's API calls a field that has another name here."""


class StreamOptions(Strict):
    """What a stream brings besides."""

    include_usage: bool | None = described(None, "At the end, an event with the tokens' numbers.")
    include_obfuscation: Literal[False] | None = described(None, "Only false: events are plain.")
    continuous_usage_stats: Literal[False] | None = described(None, "Only false: once, at the end.")


class Options(Strict):
    """Fields of OpenAI's API, then ours, which are called as vLLM's where it has them.

    Those of one value are there for clients that always send them: they get what they ask for.
    """

    model: str | None = described(None, "Its name; absent: the one that is served.")
    stream: bool | None = described(False, "Answer piece by piece: server-sent events.")
    stream_options: StreamOptions | None = described(None, "Only with stream.")
    temperature: float | None = sampled("temperature", None, "0: greedy. Absent: 1; with beams 0.")
    top_p: float | None = sampled(
        "top_p", None, "Only the likeliest tokens that together reach it."
    )
    n: Whole | None = sampled("n", None, "Answers to each prompt.")
    stop: StopString | StopStrings | None = described(None, "The answer ends before these.")
    presence_penalty: float | None = sampled(
        "presence_penalty", None, "Taken from the scores of tokens generated already."
    )
    frequency_penalty: float | None = sampled(
        "frequency_penalty", None, "The same, times how often they were."
    )
    logit_bias: Biases | None = described(
        None, "Added to the scores of these tokens.", maxProperties=MAX_BIASES
    )
    seed: int | None = sampled("seed", None, "The same seed, the same text. Absent: 0, not chance.")
    user: str | None = described(None, "Ignored.")
    metadata: dict[str, str] | None = described(None, "Ignored.")
    safety_identifier: str | None = described(None, "Ignored.")
    prompt_cache_key: str | None = described(None, "Ignored.")
    service_tier: Literal["auto", "default"] | None = described(None, "Ignored.")
    store: Literal[False] | None = described(None, "Only false: nothing is kept.")

    top_k: Whole | None = sampled(
        "top_k", None, "Only so many of the likeliest tokens; 0 or -1: all.", minimum=-1
    )
    min_p: float | None = sampled(
        "min_p", None, "Only tokens so likely, as a part of the likeliest one."
    )
    repetition_penalty: float | None = sampled(
        "repetition_penalty", None, "Divides the scores of tokens present already."
    )
    stop_token_ids: StopTokens | None = described(None, "The answer ends before these tokens.")
    ignore_eos: bool | None = described(None, "Go on after the model's end token.")
    use_beam_search: bool | None = described(
        None, "A beam search with num_beams beams; absent: best_of or n beams."
    )
    num_beams: Whole | None = sampled("num_beams", None, "Beams, of which the best n are answered.")
    num_beam_groups: Whole | None = sampled(
        "num_beam_groups", None, "Groups of beams that shall differ."
    )
    diversity_penalty: float | None = sampled(
        "diversity_penalty", None, "What a token costs that another group chose."
    )
    length_penalty: float | None = sampled(
        "length_penalty", None, "Beams compare by log-probability / length ** this."
    )
    min_tokens: Annotated[int, pydantic.Field(ge=0, le=0)] | None = described(
        None, "Only 0: an answer ends where the model ends it; see ignore_eos."
    )
    skip_special_tokens: Literal[True] | None = described(
        None, "Only true: the token that ends an answer is no part of its text."
    )
    spaces_between_special_tokens: Literal[True] | None = described(None, "Only true: no effect.")
    include_stop_str_in_output: Literal[False] | None = described(
        None, "Only false: the text ends before a stop string."
    )
    prompt_logprobs: None = None
    truncate_prompt_tokens: None = None
    guided_json: None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None
    structured_outputs: None = None
    deadline_ms: Milliseconds | None = DEADLINE
    priority: Whole = PRIORITY

    @property
    def deadline_s(self) -> float | None:
        return self.deadline_ms / 1000 if self.deadline_ms else None

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def beams(self) -> int | None:
        """As `num_beams` says, or vLLM's switch; None: nothing was said."""
        return self.num_beams if self.num_beams or not self.use_beam_search else self.n

    def sampling(self, **more: Any) -> SamplingParams:
        """These options as the engine's. Raises RequestError for what is out of range."""
        check(
            bool(self.stream) or self.stream_options is None,
            "stream_options",
            "them without",
            "absent, or sent with stream=true",
        )
        given = {name: value for name in _SAME if (value := getattr(self, name)) is not None}
        if self.beams is not None and self.beams > 1:
            given = {"temperature": 0.0} | given | {"num_beams": self.beams}
        given["stop"] = self.stops
        given["stop_token_ids"] = tuple(self.stop_token_ids or ())
        given["ignore_end"] = bool(self.ignore_eos)
        given["top_k"] = 0 if self.top_k == -1 else self.top_k or 0
        bias = self.logit_bias or {}
        given["logit_bias"] = biases({int(token): value for token, value in bias.items()})
        return SamplingParams(**given | more)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
