"""The EAS shape, without Ray: the FastAPI application in front of a service."""

from typing import Any

import pytest

from gptmoe.generate.params import SamplingParams
from serve.service import Service
from tests.serve.web.browser import Browser, events
from tests.serve.web.talker import Talker


def test_text_is_prompt_and_continuation(talking: Browser) -> None:
    response = talking.post(parameters={"max_length": 3, "top_k": 5})
    assert response.status_code == 200
    assert response.json() == {"text": "春风春眠不"}


def test_parameters_may_be_absent(talking: Browser) -> None:
    assert len(talking.post().json()["text"]) == len("春风") + 128


def test_events_bring_each_delta_and_a_reason(talking: Browser) -> None:
    whole = talking.post(parameters={"max_length": 3}, path="/generate/stream")
    asked = talking.post(parameters={"max_length": 3}, stream=True)
    assert events(whole) == events(asked)
    assert events(whole) == [
        {"text": "春", "token_ids": [ord("春")]},
        {"text": "眠", "token_ids": [ord("眠")]},
        {
            "text": "不",
            "token_ids": [ord("不")],
            "finish_reason": "length",
            "prompt_tokens": 2,
            "completion_tokens": 3,
        },
    ]


def test_newlines_travel_as_two_characters(talking: Browser, talker: Talker) -> None:
    """What comes: backslash and n, backslash and quote; what goes: backslash and n alone."""
    talker.said = [ord(character) for character in "\n月\n"]
    asked = {"inputs": ['床前\\n\\"明\n'], "parameters": {"max_length": 3}}
    assert talking("POST", "/generate", json=asked).json() == {"text": '床前\\n"明\\n\\n月\\n'}
    assert "".join(map(chr, talker.requests[0].prompt_ids)) == '床前\n"明\n'
    pieces = events(talking("POST", "/generate/stream", json=asked))
    assert [piece["text"] for piece in pieces] == ["\\n", "月", "\\n"]


def test_stop_strings_follow_the_rule_for_newlines(talking: Browser, talker: Talker) -> None:
    talker.said = [ord(character) for character in "月\n"]
    assert talking.post(parameters={"stop": ["\\n"]}).json() == {"text": "春风月"}


def test_parameters_and_the_id_reach_the_engine(talking: Browser, talker: Talker) -> None:
    given = {
        "temperature": 0.0, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "seed": 5, "num_beams": 4,
        "num_beam_groups": 2, "diversity_penalty": 0.5, "length_penalty": 0.8,
    }  # fmt: skip
    other = {"max_length": 3, "stop": ["。"], "stop_token_ids": [9], "priority": -2}
    asked = {"inputs": ["春"], "parameters": given | other | {"deadline_ms": 60_000}}
    headers = {"X-Request-Id": "poem"}
    assert talking("POST", "/generate", json=asked, headers=headers).status_code == 200
    [request] = talker.requests
    assert request.sampling == SamplingParams(
        **given, max_new_tokens=3, stop=("。",), stop_token_ids=(9,)
    )
    assert (request.request_id, request.priority) == ("poem", -2)
    assert request.deadline_s is not None


def test_stop_strings(talking: Browser) -> None:
    assert talking.post(parameters={"stop": ["不"]}).json() == {"text": "春风春眠"}


@pytest.mark.parametrize(
    ("body", "field", "sentence"),
    [
        ({}, "inputs", "inputs is missing"),
        ({"inputs": []}, "inputs", "inputs must hold at least 1, found 0"),
        ({"inputs": ["a", "b"]}, "inputs", "inputs must hold at most 1, found 2"),
        ({"inputs": "春"}, "inputs", "inputs is wrong: Input should be a valid list, found '春'"),
        ({"inputs": [1]}, "inputs.0", "Input should be a valid string, found 1"),
        ({"inputs": [None]}, "inputs.0", "Input should be a valid string, found None"),
        ({"inputs": [""]}, "inputs", "inputs must be at least one character"),
        ({"inputs": ["春" * 64]}, "inputs", "inputs must be at most 63 tokens"),
        ({"inputs": ["春"], "input": 1}, "input", "input is not a known field"),
        ([], "", "Input should be a valid dictionary"),
        ("春", "", "Input should be a valid dictionary"),
    ],
)
def test_a_bad_body_is_400_with_a_sentence(
    talking: Browser, body: Any, field: str, sentence: str
) -> None:
    for path in ("/generate", "/generate/stream"):
        response = talking("POST", path, json=body)
        error = response.json()["error"]
        assert response.status_code == 400
        assert error["field"] == field
        assert sentence in error["message"]
        assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("max_length", -5, "parameters.max_length must be at least 1; found -5"),
        ("max_length", 0, "parameters.max_length must be at least 1; found 0"),
        ("max_length", 1.5, "found 1.5"),
        ("max_length", "3", "Input should be a valid integer, found '3'"),
        ("max_length", True, "Input should be a valid integer, found True"),
        ("max_length", None, "Input should be a valid integer, found None"),
        ("top_k", -1, "parameters.top_k must be at least 0"),
        ("top_p", 0, "parameters.top_p must be above 0"),
        ("top_p", 1.5, "parameters.top_p must be above 0 and at most 1; found 1.5"),
        ("temperature", -0.1, "parameters.temperature must be between 0 (greedy) and 100"),
        ("temperature", "hot", "Input should be a valid number, found 'hot'"),
        ("repetition_penalty", 0, "parameters.repetition_penalty must be above 0"),
        ("seed", 2**70, "parameters.seed must be a 64-bit whole number"),
        ("stop", ["a"] * 10_000, "parameters.stop must be at most 16 of them; found 10000"),
        ("stop", [""], "parameters.stop must be strings of at least one character"),
        ("stop", "。", "Input should be a valid list"),
        ("temprature", 1, "parameters.temprature is not a known field"),
    ],
)
def test_a_bad_parameter_is_400_and_named(
    talking: Browser, name: str, value: Any, sentence: str
) -> None:
    response = talking.post(parameters={name: value})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["field"] == f"parameters.{name}"
    assert sentence in error["message"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "the body is not valid JSON"),
        (b"", "the body is missing"),
        (b"\xff\xfe{}", "the body must be UTF-8 text"),
        (b'{"inputs": ["\xff"]}', "inputs.0 must be UTF-8 text"),
        (b'{"inputs": ["\\ud800"]}', "inputs"),
        (b'{"inputs": ["a"], "parameters": {"temperature": NaN}}', "finite number, found nan"),
        (b'{"inputs": ["a"], "parameters": {"temperature": Infinity}}', "finite number, found inf"),
        (b'{"inputs": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_unreadable_bodies_are_400(talking: Browser, content: bytes, sentence: str) -> None:
    headers = {"content-type": "application/json"}
    response = talking("POST", "/generate", content=content, headers=headers)
    assert response.status_code == 400
    assert sentence in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_wrong_content_type_is_415(talking: Browser, kind: str) -> None:
    content = b'{"inputs": ["a"]}'
    headers = {"content-type": kind} if kind else {}
    response = talking("POST", "/generate", content=content, headers=headers)
    assert response.status_code == 415
    sentence = f"the body must be JSON; found {kind or 'none'}; send the header Content-Type"
    assert sentence in response.json()["error"]["message"]


def test_unknown_paths_and_methods(talking: Browser) -> None:
    assert talking("GET", "/nothing").json() == {"error": {"message": "Not Found", "field": ""}}
    assert talking("GET", "/nothing").status_code == 404
    assert talking("GET", "/generate").status_code == 405


@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
def test_a_full_queue_is_429_with_a_time(browser: Browser, engine: Any, path: str) -> None:
    engine.capacity = 0
    response = browser.post(path=path)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert "queue is full" in response.json()["error"]["message"]


def test_health_and_a_stopped_engine(browser: Browser, service: Service) -> None:
    assert browser("GET", "/healthz").json() == {"status": "ok"}
    service.stop()
    for response in (browser("GET", "/healthz"), browser.post()):
        assert response.status_code == 503
        assert "engine has stopped" in response.json()["error"]["message"]


def test_an_engine_that_fails_in_mid_stream_ends_it_with_an_error_event(
    talking: Browser, talker: Talker
) -> None:
    talker.breaks_after = 3
    *deltas, last = events(talking.post(parameters={"max_length": 9}, path="/generate/stream"))
    assert [delta["text"] for delta in deltas] == ["春", "眠", "不"]
    assert "engine has stopped" in last["error"]["message"]


def test_the_model_describes_itself(talking: Browser) -> None:
    card = talking("GET", "/model").json()
    assert card["name"] == "poems"
    assert card["num_experts"] == [4]


def test_the_schema_names_every_parameter(talking: Browser) -> None:
    schema = talking("GET", "/openapi.json").json()
    parameters = schema["components"]["schemas"]["Parameters"]["properties"]
    assert parameters["max_length"]["default"] == 128
    assert set(parameters) >= {
        "max_length", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop",
    }  # fmt: skip
