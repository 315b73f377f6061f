"""POST /v1/chat/completions: the template, shapes and refusals as OpenAI's."""

from typing import Any

import pytest

from tests.serve.web.browser import Browser, events
from tests.serve.web.talker import Talker


def prompt_of(talker: Talker) -> str:
    return "".join(map(chr, talker.requests[-1].prompt_ids))


def test_an_answer_has_all_fields(talking: Browser) -> None:
    response = talking.chat("你好", max_tokens=2)
    assert response.status_code == 200
    answer = response.json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1_700_000_000
    message = {"role": "assistant", "content": "春眠", "refusal": None}
    assert answer == {
        "object": "chat.completion",
        "model": "poems",
        "system_fingerprint": "weights-7",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": len("用户：你好\n助手："),
            "completion_tokens": 2,
            "total_tokens": len("用户：你好\n助手：") + 2,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }


def test_the_template(talking: Browser, talker: Talker) -> None:
    parts = [{"type": "text", "text": "写"}, {"type": "text", "text": "诗"}]
    messages = [
        {"role": "system", "content": "你是诗人。"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "好。", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "请", "name": "李"},
    ]  # fmt: skip
    body = {"messages": messages, "stop": ["。"]}
    assert talking("POST", "/v1/chat/completions", json=body | {"max_tokens": 1}).status_code == 200
    assert prompt_of(talker) == "系统：你是诗人。\n用户：写诗\n助手：好。\n用户：请\n助手："
    assert talker.requests[0].sampling.stop == ("。", "\n用户：")


def test_an_answer_ends_before_the_user_would_speak(talking: Browser, talker: Talker) -> None:
    talker.said = [ord(character) for character in "你好\n用户：再"]
    choice = talking.chat("你好").json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("你好", "stop")


def test_as_many_tokens_as_the_context_has(talking: Browser, talker: Talker) -> None:
    talking.chat("你好")
    talking.chat("你好", max_completion_tokens=3)
    assert [request.sampling.max_new_tokens for request in talker.requests] == [64, 3]


def test_log_probabilities(talking: Browser) -> None:
    asked = {"logprobs": True, "top_logprobs": 2, "max_tokens": 1}
    choice = talking.chat("你好", **asked).json()["choices"][0]
    spring = {"token": "春", "logprob": -1, "bytes": list("春".encode())}
    successor = chr(ord("春") + 1)
    other = {"token": successor, "logprob": -2, "bytes": list(successor.encode())}
    wanted = spring | {"top_logprobs": [spring, other]}
    assert choice["logprobs"] == {"content": [wanted], "refusal": None}


def test_a_stream_brings_the_same_answers(talking: Browser) -> None:
    asked = {"max_tokens": 3, "n": 2, "logprobs": True}
    whole = talking.chat("你好", **asked).json()
    *chunks, last, done = events(
        talking.chat("你好", **asked, stream=True, stream_options={"include_usage": True})
    )
    assert done == "[DONE]"
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    for wanted in whole["choices"]:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == wanted["index"]]
        first, *said, end = pieces
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert "".join(piece["delta"]["content"] for piece in said) == wanted["message"]["content"]
        tokens = [token for piece in said for token in piece["logprobs"]["content"]]
        assert tokens == wanted["logprobs"]["content"]
        assert (end["delta"], end["finish_reason"]) == ({}, "length")
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("prediction", {"type": "content"}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("store", True),
        ("service_tier", "flex"),
        ("moderation", {}),
    ],
)
def test_what_we_cannot_do_is_refused_by_name(talking: Browser, name: str, value: Any) -> None:
    response = talking.chat("你好", **{name: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"].split(".")[0] == name
    assert name in response.json()["error"]["message"]


def test_fields_that_ask_for_nothing_are_let_through(talking: Browser) -> None:
    nothing = {
        "tools": [], "tool_choice": "none", "functions": None, "response_format": {"type": "text"},
        "modalities": ["text"], "audio": None, "store": False, "metadata": {"a": "b"}, "user": "李",
        "service_tier": "auto", "parallel_tool_calls": True, "reasoning_effort": None,
    }  # fmt: skip
    assert talking.chat("你好", **nothing, max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("given", "param", "sentence"),
    [
        ({"messages": []}, "messages", "messages must hold at least 1, found 0"),
        ({"messages": "你好"}, "messages", "Input should be a valid list"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages.0.role", "'system', 'develop"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "messages.0.content is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content",
         "messages.0.content must be a text or a list of text parts, found None"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages.0.content.0.type", "Input should be 'text', found 'image_url'"),
        ({"messages": [{"role": "user", "content": "春" * 64}]}, "messages",
         "messages must be at most 63 tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "max_tokens must be absent"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1; found 0"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "must be at least 1; found 0"),
        ({"top_logprobs": 2}, "top_logprobs", "sent with logprobs=true"),
        ({"top_logprobs": 30, "logprobs": True}, "top_logprobs", "between 0 and 20"),
        ({"stop": ["a"] * 16}, "stop", "stop must be at most 15 of them; found 16"),
        ({"tools": [{}]}, "tools", "tools is not supported here; leave it out, or send null"),
        ({"audio": {}}, "audio", "audio is not supported here"),
        ({"best_of": 1}, "best_of", "best_of is not a known field"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_400_and_named(
    talking: Browser, given: dict[str, Any], param: str, sentence: str
) -> None:
    body = {"messages": [{"role": "user", "content": "你好"}]} | given
    response = talking("POST", "/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert sentence in error["message"]
