"""OpenAI's own Python client against our HTTP, over a real connection."""

import asyncio
from collections.abc import Callable, Iterator

import openai
import pytest

from gptmoe.errors import DeadlineExceeded
from serve.service import Service
from serve.web.app import build
from tests.serve.web.talker import Keyring, Talker, served


@pytest.fixture(scope="module")
def address(talk: Service) -> Iterator[str]:
    with served(build(talk, stall_s=60, keys=Keyring("sesame"))) as client:
        yield f"{client.base_url}/v1"


@pytest.fixture
def ask(address: str, talker: Talker) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=address, api_key="sesame", max_retries=0) as ask:
        yield ask


def test_models(ask: openai.OpenAI) -> None:
    assert [model.id for model in ask.models.list()] == ["poems"]
    assert ask.models.retrieve("poems").owned_by == "gptmoe"
    with pytest.raises(openai.NotFoundError, match="model 'gpt-4' is not served here"):
        ask.models.retrieve("gpt-4")


def test_a_completion(ask: openai.OpenAI) -> None:
    answer = ask.completions.create(
        model="poems", prompt=["春", "风"], max_tokens=2, n=2, logprobs=1, echo=True, seed=1
    )
    assert [choice.text for choice in answer.choices] == ["春春眠", "春眠不", "风春眠", "风眠不"]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 2 + 8
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["春", "春", "眠"]
    assert answer.choices[0].finish_reason == "length"


def test_a_streamed_completion(ask: openai.OpenAI) -> None:
    stream = ask.completions.create(model="poems", prompt="春", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "春眠不觉晓"


def test_a_chat(ask: openai.OpenAI) -> None:
    answer = ask.chat.completions.create(
        model="poems",
        messages=[{"role": "system", "content": "你是诗人。"}, {"role": "user", "content": "请"}],
        max_completion_tokens=3,
        logprobs=True,
        top_logprobs=2,
        extra_body={"top_k": 5},
        extra_headers={"X-Request-Id": "poem"},
    )
    assert answer.id == "chatcmpl-poem"
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "春眠不")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [token.token for token in choice.logprobs.content] == ["春", "眠", "不"]


def test_an_answer_may_be_sent_back(ask: openai.OpenAI) -> None:
    first = ask.chat.completions.create(
        model="poems", messages=[{"role": "user", "content": "请"}], max_tokens=2
    )
    message = first.choices[0].message
    second = ask.chat.completions.create(
        model="poems",
        messages=[message.model_dump(), {"role": "user", "content": "再"}],  # type: ignore[list-item]
        max_tokens=2,
    )
    assert second.choices[0].message.content == "春眠"


def test_a_streamed_chat(ask: openai.OpenAI) -> None:
    stream = ask.chat.completions.create(
        model="poems",
        messages=[{"role": "user", "content": "请"}],
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "春眠不觉"
    assert last.usage is not None
    assert last.usage.completion_tokens == 4


def test_clients_that_wait_side_by_side(address: str, talker: Talker) -> None:
    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=address, api_key="sesame") as ask:
            calls = [
                ask.completions.create(model="poems", prompt="春", max_tokens=k)
                for k in range(1, 6)
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    assert asyncio.run(all_at_once()) == ["春", "春眠", "春眠不", "春眠不觉", "春眠不觉晓"]


def test_refusals_become_its_errors(ask: openai.OpenAI, address: str, talker: Talker) -> None:
    with pytest.raises(openai.BadRequestError, match="n must be between 1 and 16") as bad:
        ask.completions.create(model="poems", prompt="春", n=17)
    assert (bad.value.param, bad.value.code) == ("n", "invalid_value")
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here"):
        ask.completions.create(model="gpt-4", prompt="春")
    with pytest.raises(openai.BadRequestError, match="tools"):
        ask.chat.completions.create(
            model="poems",
            messages=[{"role": "user", "content": "请"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    wrong = openai.OpenAI(base_url=address, api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
        wrong.models.list()


def test_what_was_late_is_asked_once(address: str, talker: Talker) -> None:
    talker.refusal = DeadlineExceeded("late")
    patient = openai.OpenAI(base_url=address, api_key="sesame")
    with patient, pytest.raises(openai.APIStatusError, match="late"):
        patient.completions.create(model="poems", prompt="春")
    assert len(talker.requests) == 1


def test_a_stream_that_breaks_raises(ask: openai.OpenAI, talker: Talker) -> None:
    talker.breaks_after = 2
    stream = ask.completions.create(model="poems", prompt="春", stream=True)
    assert [next(stream).choices[0].text for _ in range(2)] == ["春", "眠"]
    with pytest.raises(openai.APIError, match="engine has stopped"):
        next(stream)


def test_leaving_a_stream_ends_its_work(
    ask: openai.OpenAI, talker: Talker, wait_until: Callable[..., None]
) -> None:
    with ask.completions.create(
        model="poems", prompt="春", max_tokens=10**9, stream=True
    ) as stream:
        next(iter(stream))
        assert talker.running
    wait_until(lambda: not talker.running)
