"""The OpenAPI schema: what it says is what is answered, whatever is sent (schemathesis).

Each route is asked with requests that fit the schema and with requests that do not. Never may it
fail with 500, answer with a status, a header or a body that the schema does not name, take what the
schema forbids, or answer without the key.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance

from gptmoe.errors import RequestError
from gptmoe.generate.params import MAX_ANSWERS, SamplingParams
from serve.service import Service
from serve.web.app import build
from serve.web.chat import ChatBody
from serve.web.completions import CompletionBody
from serve.web.door import MAX_BODY_BYTES
from serve.web.eas import Parameters
from tests.serve.web.browser import Browser
from tests.serve.web.talker import Keyring, Talker, served

EXAMPLES = 25
"""A route and mode: all together take seconds."""

AUTHORIZED = {"Authorization": "Bearer sesame"}

WITH_INPUT = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/generate"),
    ("POST", "/generate/stream"),
]
WITHOUT = [("GET", path) for path in ("/v1/models", "/model", "/healthz", "/readyz")]

once = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def schema(talk: Service) -> Iterator[Any]:
    load_all_checks()
    with served(build(talk, stall_s=60, keys=Keyring("sesame"))) as client:
        yield schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")


def ask_all(operation: Any, mode: GenerationMode) -> int:
    """How many requests were sent and answered as the schema says."""
    asked = 0

    @once
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        nonlocal asked
        # A schema cannot say all: a prompt of tokens that are not in the vocabulary is 400.
        case.call_and_validate(headers=AUTHORIZED, excluded_checks=[positive_data_acceptance])
        asked += 1

    ask()
    return asked


@pytest.mark.parametrize(("method", "path"), WITH_INPUT)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_every_route_answers_as_the_schema_says(
    schema: Any, talker: Talker, method: str, path: str, mode: GenerationMode
) -> None:
    talker.most_tokens = 64  # as a context would end them
    assert ask_all(schema[path][method], mode) == EXAMPLES
    assert not talker.running


@pytest.mark.parametrize(("method", "path"), WITHOUT)
def test_routes_that_take_nothing(schema: Any, talker: Talker, method: str, path: str) -> None:
    assert ask_all(schema[path][method], GenerationMode.POSITIVE) >= 1


def test_no_route_is_left_out(talking: Browser) -> None:
    paths = talking("GET", "/openapi.json").json()["paths"]
    found = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert found == {*WITH_INPUT, *WITHOUT}


@pytest.mark.parametrize("model", [CompletionBody, ChatBody, Parameters])
def test_one_step_outside_a_bound_is_refused_by_the_engine(model: Any) -> None:
    """And so is the bound itself where it is excluded."""
    steps = {"minimum": -1, "maximum": 1, "exclusiveMinimum": 0}
    fields = model.model_json_schema()["properties"]
    checked = 0
    for name in SamplingParams.__dataclass_fields__.keys() & fields.keys():
        if name == "top_k":  # -1 is all tokens, as in vLLM
            continue
        for bound in steps.keys() & fields[name].keys():
            value = fields[name][bound] + steps[bound]
            with pytest.raises(RequestError, match=name):
                SamplingParams(**{name: value})
            checked += 1
    assert checked >= 15


BESIDE: dict[str, dict[str, Any]] = {
    "num_beams": {"temperature": 0},
    "num_beam_groups": {"temperature": 0, "num_beams": MAX_ANSWERS},
    "best_of": {"temperature": 0, "use_beam_search": True},
    "top_logprobs": {"logprobs": True},
}
"""What a field wants beside it to be of any use."""

ITEMS: dict[str, Any] = {"string": "春", "integer": 1, "array": [1], "null": None}


def ends(schema: Any) -> list[Any]:
    """A value for each bound that a field's schema states, which just keeps it."""
    found: list[Any] = []
    choices = next((schema[name] for name in ("anyOf", "oneOf") if name in schema), [schema])
    outer = {name: value for name, value in schema.items() if name not in ("anyOf", "oneOf")}
    for one in choices:
        kind, bounds = one.get("type"), one | outer
        items = bounds.get("items", {})
        if kind in ("integer", "number"):
            found += [bounds[name] for name in ("minimum", "maximum") if name in bounds]
        if "exclusiveMinimum" in bounds and kind == "number":
            found.append(math.nextafter(bounds["exclusiveMinimum"], math.inf))
        if kind == "string" and bounds.get("maxLength") != MAX_BODY_BYTES:
            found += ["春" * bounds[name] for name in ("minLength", "maxLength") if name in bounds]
        if kind == "array" and "type" in items:
            item = items.get("const", ITEMS[items["type"]])
            found += [[item] * bounds[name] for name in ("minItems", "maxItems") if name in bounds]
        if kind == "object" and "maxProperties" in bounds:
            found.append({str(key): 1.0 for key in range(bounds["maxProperties"])})
    return found


@pytest.mark.parametrize(
    ("path", "model", "least"),
    [("/v1/completions", CompletionBody, 40), ("/v1/chat/completions", ChatBody, 40),
     ("/generate", Parameters, 30)],
)  # fmt: skip
def test_every_bound_in_the_schema_is_itself_accepted(
    talking: Browser, talker: Talker, path: str, model: Any, least: int
) -> None:
    talker.most_tokens = 2
    bodies = {
        "/v1/completions": {"prompt": "春", "echo": True},  # as max_tokens=0 wants it
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "春"}]},
        "/generate": {"inputs": ["春"]},
    }
    asked = 0
    for name, schema in model.model_json_schema()["properties"].items():
        for value in ends(schema):
            given = BESIDE.get(name, {}) | {name: value}
            more = {"parameters": given} if model is Parameters else given
            response = talking("POST", path, json=bodies[path] | more)
            assert response.status_code == 200, (name, value, response.text)
            asked += 1
    assert asked >= least


@pytest.mark.parametrize(("bias", "status"), [(-100, 200), (100, 200), (-101, 400), (101, 400)])
def test_the_schema_bounds_biases_as_the_engine_does(
    talking: Browser, bias: float, status: int
) -> None:
    for model in (CompletionBody, ChatBody):
        one, _ = model.model_json_schema()["properties"]["logit_bias"]["anyOf"]
        [bounds] = one["patternProperties"].values()
        assert (bounds["minimum"] <= bias <= bounds["maximum"]) == (status == 200)
    assert talking.complete(logit_bias={"5": bias}, max_tokens=1).status_code == status


def test_keys_are_in_the_schema_where_they_are_needed(schema: Any, talking: Browser) -> None:
    with_keys = schema.raw_schema["paths"]
    assert with_keys["/generate"]["post"]["security"] == [{"key": []}]
    assert "security" not in with_keys["/healthz"]["get"]
    without = talking("GET", "/openapi.json").json()
    assert "securitySchemes" not in without["components"]
    assert "401" not in without["paths"]["/generate"]["post"]["responses"]
