"""POST /v1/completions: shapes and refusals as OpenAI's."""

from typing import Any

import pytest

from gptmoe.generate.delta import Delta
from gptmoe.generate.output import TextStream
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request
from tests.serve.web.browser import Browser, events
from tests.serve.web.talker import Talker


def by_index(choice: dict[str, Any]) -> int:
    index: int = choice["index"]
    return index


def test_a_completion_has_all_fields(talking: Browser) -> None:
    response = talking.complete(max_tokens=3)
    assert response.status_code == 200
    answer = response.json()
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "object": "text_completion",
        "model": "poems",
        "system_fingerprint": "weights-7",
        "choices": [{"index": 0, "text": "春眠不", "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }


def test_sixteen_tokens_unless_asked(talking: Browser) -> None:
    assert len(talking.complete().json()["choices"][0]["text"]) == 16


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("春", ["春"]),
        (["春", "风"], ["春", "风"]),
        ([0x6625, 0x98CE], ["春风"]),
        ([[0x6625], [0x98CE]], ["春", "风"]),
    ],
)
def test_prompts_as_texts_or_tokens(talking: Browser, prompt: Any, texts: list[str]) -> None:
    choices = talking.complete(prompt, max_tokens=1, echo=True, n=2).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(2 * len(texts)))
    wanted = [text + answer for text in texts for answer in "春眠"]
    assert [choice["text"] for choice in choices] == wanted


def test_several_prompts_have_ids_of_their_own(talking: Browser, talker: Talker) -> None:
    body = {"prompt": ["春", "风"], "max_tokens": 1}
    answer = talking("POST", "/v1/completions", json=body, headers={"X-Request-Id": "poem"}).json()
    assert answer["id"] == "cmpl-poem"
    assert answer["usage"]["prompt_tokens"] == 2
    assert [request.request_id for request in talker.requests] == ["poem-0", "poem-1"]


def test_parameters_reach_the_engine(talking: Browser, talker: Talker) -> None:
    given = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.3, "repetition_penalty": 1.1, "seed": 5, "n": 2,
        "length_penalty": 0.8, "diversity_penalty": 0.0,
    }  # fmt: skip
    other = {
        "max_tokens": 4, "stop": "。", "stop_token_ids": [9], "logit_bias": {"12": -1.5, "3": 2},
        "ignore_eos": True, "priority": -3, "user": "李白", "model": "poems",
    }  # fmt: skip
    assert talking.complete(**given, **other).status_code == 200
    [request] = talker.requests
    assert request.sampling == SamplingParams(
        **given, max_new_tokens=4, stop=("。",), stop_token_ids=(9,), ignore_end=True,
        logit_bias=((3, 2), (12, -1.5)),
    )  # fmt: skip
    assert request.priority == -3


@pytest.mark.parametrize(
    ("given", "beams", "temperature"),
    [
        ({"num_beams": 4, "n": 2}, 4, 0),
        ({"use_beam_search": True, "n": 3}, 3, 0),
        ({"use_beam_search": True, "best_of": 4, "n": 2}, 4, 0),
        ({"use_beam_search": False}, 1, 1),
        ({"top_k": -1}, 1, 1),
    ],
)
def test_beams(
    talking: Browser, talker: Talker, given: dict[str, Any], beams: int, temperature: float
) -> None:
    assert talking.complete(max_tokens=1, **given).status_code == 200
    sampling = talker.requests[0].sampling
    assert (sampling.num_beams, sampling.temperature, sampling.top_k) == (beams, temperature, 0)


def test_log_probabilities(talking: Browser) -> None:
    [choice] = talking.complete(max_tokens=2, logprobs=2, echo=True).json()["choices"]
    assert choice["text"] == "春风春眠"
    successors = [chr(ord(character) + 1) for character in "春眠"]
    assert choice["logprobs"] == {
        "tokens": ["春", "风", "春", "眠"],
        "token_logprobs": [None, -0.5, -1, -2],
        "top_logprobs": [
            None,
            {chr(ord("风") + 1): -0.25, "风": -0.5},
            {"春": -1, successors[0]: -2},
            {"眠": -2, successors[1]: -3},
        ],
        "text_offset": [0, 1, 2, 3],
    }


def test_log_probabilities_of_the_chosen_tokens_alone(talking: Browser) -> None:
    [choice] = talking.complete(max_tokens=2, logprobs=0).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-1, -2]
    assert choice["logprobs"]["top_logprobs"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_without_a_token_behind_it(
    talking: Browser, talker: Talker, stream: bool
) -> None:
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    asked = {"max_tokens": 0, "echo": True, "logprobs": 1, "stream": stream, **usage}
    response = talking.complete(["春风", "月"], **asked)
    chunks = events(response)[:-1] if stream else [response.json()]
    spring, moon = sorted((c for chunk in chunks for c in chunk["choices"]), key=by_index)
    assert (spring["text"], spring["finish_reason"]) == ("春风", "length")
    assert spring["logprobs"]["token_logprobs"] == [None, -0.5]
    assert (moon["text"], moon["logprobs"]["tokens"]) == ("月", ["月"])
    usage = chunks[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 0)
    assert all(request.score_only for request in talker.requests)
    [plain] = talking.complete("春风", max_tokens=0, echo=True).json()["choices"]
    assert (plain["text"], plain["logprobs"]) == ("春风", None)


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_said_of_a_prompt_that_was_not_scored(
    talking: Browser, talker: Talker, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Of a request that was ended while it waited: EngineThread.abort."""

    def ended(request: Request, index: int, step: int, text: TextStream) -> Delta:
        return Delta(request_id=request.request_id, index=index, finish_reason="abort")

    monkeypatch.setattr(talker, "_next", ended)
    response = talking.complete(logprobs=1, echo=True, stream=stream)
    assert response.status_code == 200
    [choice] = (events(response)[0] if stream else response.json())["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("春风", "abort")
    assert choice["logprobs"] == {
        "tokens": ["春"],
        "token_logprobs": [None],
        "top_logprobs": [None],
        "text_offset": [0],
    }


def test_a_stream_brings_the_same_answers(talking: Browser) -> None:
    asked = {"prompt": ["春", "风"], "max_tokens": 3, "n": 2, "logprobs": 1}
    whole = talking.complete(**asked).json()
    *chunks, last, done = events(
        talking.complete(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert done == "[DONE]"
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    for wanted in whole["choices"]:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == wanted["index"]]
        assert "".join(piece["text"] for piece in pieces) == wanted["text"]
        assert [piece["finish_reason"] for piece in pieces] == [None, None, "length"]
        offsets = [offset for piece in pieces for offset in piece["logprobs"]["text_offset"]]
        assert offsets == wanted["logprobs"]["text_offset"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["usage"] is None for chunk in chunks)


def test_a_stream_echoes_the_prompt_once(talking: Browser) -> None:
    *chunks, done = events(talking.complete(max_tokens=2, echo=True, stream=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["春风春", "眠"]
    assert done == "[DONE]"


def test_what_says_nothing_of_the_text_is_ignored_as_in_chats(talking: Browser) -> None:
    ignored = {
        "user": "李", "metadata": {"a": "b"}, "store": False, "service_tier": "auto",
        "prompt_cache_key": "k", "safety_identifier": "s",
    }  # fmt: skip
    for given in (ignored, dict.fromkeys(ignored)):
        assert talking.complete(**given, max_tokens=1).status_code == 200
    assert talking.complete(store=True).json()["error"]["param"] == "store"


def test_what_vllms_clients_send_and_ask_nothing_by_is_let_through(talking: Browser) -> None:
    nothing = {
        "skip_special_tokens": True, "spaces_between_special_tokens": True, "min_tokens": 0,
        "include_stop_str_in_output": False, "prompt_logprobs": None, "guided_json": None,
        "guided_choice": None, "truncate_prompt_tokens": None, "structured_outputs": None,
    }  # fmt: skip
    for given in (nothing, dict.fromkeys(nothing)):
        assert talking.complete(**given, max_tokens=1).status_code == 200
        assert talking.chat("你好", **given, max_tokens=1).status_code == 200
    speaks = {"add_generation_prompt": True, "continue_final_message": False, "chat_template": None}
    assert talking.chat("你好", **speaks, max_tokens=1).status_code == 200
    at_end = {"include_usage": True, "continuous_usage_stats": False}
    *_, last, _ = events(talking.complete(max_tokens=1, stream=True, stream_options=at_end))
    assert last["usage"]["completion_tokens"] == 1


def test_stop_strings(talking: Browser) -> None:
    [choice] = talking.complete(stop=["晓", "觉"]).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("春眠不", "stop")


@pytest.mark.parametrize(
    ("given", "param", "sentence"),
    [
        ({"prompt": 1}, "prompt", "must be a text, its token ids, or a list of either, found 1"),
        ({"prompt": {}}, "prompt", "must be a text, its token ids, or a list of either, found {}"),
        ({"prompt": [0.5]}, "prompt", "its token ids, or a list of either, found [0.5]"),
        ({"prompt": []}, "prompt", "prompt must hold at least 1, found 0"),
        ({"prompt": [[]]}, "prompt.0", "prompt.0 must hold at least 1, found 0"),
        ({"prompt": [1, "春"]}, "prompt.1", "Input should be a valid integer, found '春'"),
        ({"prompt": [[1], "春"]}, "prompt.1", "Input should be a valid list, found '春'"),
        ({"prompt": ["春"] * 65}, "prompt", "prompt must hold at most 64, found 65"),
        ({"prompt": [0x110000]}, "prompt", "prompt must be token ids from 0 to"),
        ({"prompt": [-1]}, "prompt.0", "greater than or equal to 0, found -1"),
        ({"prompt": ""}, "prompt", "prompt must be at least one character"),
        ({"prompt": "春" * 64}, "prompt", "prompt must be at most 63 tokens"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1; found 0"),
        ({"max_tokens": 0, "echo": True, "n": 2}, "n", "n must be 1 where max_tokens is 0"),
        ({"max_tokens": 0, "echo": True, "num_beams": 2}, "num_beams", "num_beams must be 1 where"),
        ({"max_tokens": 2**40}, "max_tokens", "less than or equal to 2147483647"),
        ({"temperature": 10**400}, "temperature", "temperature is wrong"),
        ({"temperature": "hot"}, "temperature", "Input should be a valid number, found 'hot'"),
        ({"top_p": 0}, "top_p", "top_p must be above 0"),
        ({"top_k": -2}, "top_k", "top_k must be at least 0"),
        ({"n": 0}, "n", "n must be between 1 and 16"),
        ({"n": 2, "temperature": 0}, "n", "n must be 1 where temperature is 0"),
        ({"best_of": 3}, "best_of", "best_of must be n=1 or absent"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams", "unless temperature is 0"),
        ({"logprobs": 21}, "logprobs", "logprobs must be between 0 and 20"),
        ({"logprobs": True}, "logprobs", "Input should be a valid integer, found True"),
        ({"stop": ["a"] * 10_000}, "stop", "stop must be at most 16 of them; found 10000"),
        ({"stop": [1]}, "stop", "stop is wrong: Input should be a valid string"),
        ({"stop": ""}, "stop", "stop must be strings of at least one character"),
        ({"logit_bias": {"春": 1}}, "logit_bias.春", "should match pattern"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "between -100 and 100"),
        ({"logit_bias": [1]}, "logit_bias", "Input should be a valid dictionary"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "greater than or equal to 0"),
        ({"suffix": "晓"}, "suffix", "suffix is wrong: Input should be ''"),
        ({"priority": 101}, "priority", "priority must be a whole number between -100 and 100"),
        ({"deadline_ms": -1}, "deadline_ms", "greater than or equal to 0"),
        ({"stream_options": {}}, "stream_options", "absent, or sent with stream=true"),
        ({"stream": True, "stream_options": {"a": 1}}, "stream_options.a", "not a known field"),
        ({"guided_json": {"type": "object"}}, "guided_json", "guided_json is not supported here"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "prompt_logprobs is not supported here"),
        ({"min_tokens": 3}, "min_tokens", "less than or equal to 0, found 3"),
        ({"skip_special_tokens": False}, "skip_special_tokens", "should be True, found False"),
        ({"str": 1}, "str", "str is not a known field"),
        ({"temprature": 1}, "temprature", "temprature is not a known field"),
        (
            {"echo": True, "logprobs": 1, "stream": True, "n": 2},
            "echo",
            "echo must be without one of these",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_400_and_named(
    talking: Browser, given: dict[str, Any], param: str, sentence: str
) -> None:
    response = talking.complete(**{"prompt": "春"} | given)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert sentence in error["message"]
    assert len(error["message"]) < 500


def test_a_prompt_is_needed(talking: Browser) -> None:
    error = talking("POST", "/v1/completions", json={}).json()["error"]
    assert (error["param"], error["message"]) == ("prompt", "prompt is missing")


def test_an_unknown_model_is_404(talking: Browser) -> None:
    response = talking.complete(model="gpt-4")
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert error["message"] == "model 'gpt-4' is not served here; 'poems' is"
