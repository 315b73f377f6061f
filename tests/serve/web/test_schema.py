"""The OpenAPI schema: what it says is what is answered, whatever is sent (schemathesis).

Each route is asked with requests that fit the schema and with requests that do not. Never may it
fail with 500, answer with a status, a header or a body that the schema does not name, take what the
schema forbids, or answer without the key.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance

from gptmoe.errors import RequestError
from gptmoe.generate.params import SamplingParams
from serve.service import Service
from serve.web.app import build
from serve.web.chat import ChatBody
from serve.web.completions import CompletionBody
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
def test_bounds_in_the_schema_are_those_of_the_engine(model: Any) -> None:
    """One step outside each is refused, and so is the bound itself where it is excluded."""
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


def test_keys_are_in_the_schema_where_they_are_needed(schema: Any, talking: Browser) -> None:
    with_keys = schema.raw_schema["paths"]
    assert with_keys["/generate"]["post"]["security"] == [{"key": []}]
    assert "security" not in with_keys["/healthz"]["get"]
    without = talking("GET", "/openapi.json").json()
    assert "securitySchemes" not in without["components"]
    assert "401" not in without["paths"]["/generate"]["post"]["responses"]
