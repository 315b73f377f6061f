"""How the bodies of requests are declared: strictly, with their bounds in the schema.

SamplingParams checks the bounds of sampling, for all front ends alike. Those who read the OpenAPI
schema are told the same ones; tests send each of them.
"""

import math
from typing import Annotated, Any

import pydantic
from fastapi import Header

from gptmoe.generate.params import MAX_BIAS, MAX_STOP_CHARACTERS, MAX_STOPS, bounds
from gptmoe.generate.request import MAX_ID_CHARACTERS, MOST_PRIORITY

from .door import MAX_BODY_BYTES


class Strict(pydantic.BaseModel):
    """Only known fields, only values of the type that is written."""

    model_config = pydantic.ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        str_max_length=MAX_BODY_BYTES,  # with a bound, lone surrogates are found as well
    )


def described(default: Any, text: str, **schema: Any) -> Any:
    """A field with a default, a sentence, and bounds that only the schema states."""
    if not schema:  # json_schema_extra=None would hide the type's own
        return pydantic.Field(default, description=text)
    return pydantic.Field(default, description=text, json_schema_extra=schema)


def sampled(name: str, default: Any, text: str, **schema: Any) -> Any:
    """A field with the bounds of the number `name` in SamplingParams, but for what `schema` says.

    They are in the schema alone: SamplingParams refuses what is out of range, in its own words.
    """
    least, most = bounds(name)
    found = {"minimum": least, "maximum": most}
    if least == math.ulp(0.0):
        found = {"exclusiveMinimum": 0, "maximum": most}
    finite = {key: bound for key, bound in found.items() if math.isfinite(bound)}
    return described(default, text, **finite | schema)


def listed(least: int, most: int | None = None) -> Any:
    """A list of `least` to `most` items, judged by its first wrong one."""
    return pydantic.Field(min_length=least, max_length=most, fail_fast=True)


def by_shape(wanted: str) -> pydantic.Discriminator:
    """Judges a value by the one type of a choice whose `shape` it has, so that one thing is wrong.

    Of each type a Tag says the shape; a value of none of them is not `wanted`.
    """
    return pydantic.Discriminator(
        shape, custom_error_type="shape", custom_error_message=f"must be {wanted}"
    )


def shape(value: Any) -> str:
    """The type of a JSON value, and of what a list begins with; of an empty one: int."""
    if not isinstance(value, list):
        return type(value).__name__
    first = value[0] if value else 0
    return "list[list]" if isinstance(first, list) else f"list[{type(first).__name__}]"


MOST_WHOLE = 2**31 - 1

Whole = Annotated[int, pydantic.Field(ge=-(2**31), le=MOST_WHOLE)]
"""What fits where numbers are stored as 32 bits."""

TokenId = Annotated[int, pydantic.Field(ge=0, le=MOST_WHOLE)]

PromptText = Annotated[str, pydantic.Field(json_schema_extra={"minLength": 1})]

StopString = Annotated[
    str, pydantic.Field(json_schema_extra={"minLength": 1, "maxLength": MAX_STOP_CHARACTERS})
]

StopStrings = Annotated[
    list[StopString],
    pydantic.Field(fail_fast=True, json_schema_extra={"maxItems": MAX_STOPS}),
]

StopTokens = Annotated[
    list[TokenId],
    pydantic.Field(fail_fast=True, json_schema_extra={"maxItems": MAX_STOPS}),
]

Bias = Annotated[
    float, pydantic.Field(json_schema_extra={"minimum": -MAX_BIAS, "maximum": MAX_BIAS})
]

Biases = dict[Annotated[str, pydantic.Field(pattern=r"^[0-9]{1,9}$")], Bias]
"""From a token's id, written as a string, to what is added to its score."""

RequestId = Annotated[
    str | None,
    Header(
        max_length=MAX_ID_CHARACTERS,
        description="Names the request; absent: the server makes a name. No two with the same name "
        "run at once.",
    ),
]

Milliseconds = Annotated[int, pydantic.Field(ge=0, le=MOST_WHOLE)]

DEADLINE = described(
    None,
    "Milliseconds from its arrival after which nobody wants the answer, and it is refused with "
    "408; 0: no such time.",
)

PRIORITY = described(
    0,
    "Lower goes first: a step of 1 is worth 10 seconds of waiting.",
    minimum=-MOST_PRIORITY,
    maximum=MOST_PRIORITY,
)
