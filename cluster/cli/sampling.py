"""The options of `gptmoe generate` that say how to sample: one row each."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any

import typer

from gptmoe.errors import ConfigError
from gptmoe.generate.params import SamplingParams, as_params

OPTIONS: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (int, "Stop after so many tokens."),
    "temperature": (float, "0 is greedy."),
    "top_k": (int, "Keep the k likeliest tokens; 0 keeps all."),
    "top_p": (float, "Keep tokens of this probability together."),
    "min_p": (float, "Keep tokens at least this likely, beside the likeliest; 0 keeps all."),
    "repetition_penalty": (float, "Above 1: repeat less, the prompt too."),
    "presence_penalty": (float, "Above 0: repeat less."),
    "frequency_penalty": (float, "Above 0: the less, the more often it came."),
    "logit_bias": (list[str], "TOKEN=NUMBER: add to a token's score. Repeat for more."),
    "seed": (int, "The same seed gives the same text."),
    "num_beams": (int, "Beams of a beam search; wants --temperature 0."),
    "num_beam_groups": (int, "Groups of beams that shall differ."),
    "diversity_penalty": (float, "How much groups shall differ."),
    "length_penalty": (float, "Of beams: above 1 favours long texts."),
    "stop": (list[str], "Stop before this text. Repeat for more."),
    "stop_token_ids": (list[int], "Stop before this token. Repeat for more."),
    "ignore_end": (bool, "Go on after the end token."),
}
"""A field of SamplingParams that has a default there, its type here, and what its help says."""


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Put the OPTIONS in place of a command's parameter `sampling: SamplingParams`."""

    def run(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in OPTIONS}
        command(**given, sampling=_params(chosen))

    own = inspect.signature(command).parameters
    parameters = [it for name, it in own.items() if name != "sampling"]
    run.__signature__ = inspect.Signature([*parameters, *_options()])  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def _options() -> list[inspect.Parameter]:
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if defaults[name] == () else defaults[name],
            annotation=Annotated[
                kind | None if defaults[name] == () else kind,
                typer.Option(f"--{_word(name)}", help=help_text),
            ],
        )
        for name, (kind, help_text) in OPTIONS.items()
    ]


def _word(name: str) -> str:
    """An option that is given once for each item says so: --stop-token-id."""
    return name.removesuffix("s" if name.endswith("_ids") else "").replace("_", "-")


def _params(chosen: dict[str, Any]) -> SamplingParams:
    given = {name: value for name, value in chosen.items() if value is not None}
    given["logit_bias"] = dict(map(_bias, given.get("logit_bias", ())))
    return as_params(given)


def _bias(word: str) -> tuple[int, float]:
    token, _, bias = word.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise ConfigError(
            f"--logit-bias {word} is not of the form TOKEN=NUMBER, as 42=-1.5"
        ) from None
