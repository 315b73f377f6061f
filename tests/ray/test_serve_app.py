"""A small model behind Ray Serve's own proxy: gRPC and HTTP as a client sees them."""

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import ray
import ray.serve
import ray.util.state
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

import gptmoe
from cluster.client import AsyncClient, Client, GenerationError
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.model.counts import parameters
from serve.config import HealthConfig, ServeConfig
from serve.launch import Endpoints, running

ENGINE = EngineConfig(max_batch_size=2, max_queue=2)
LONG: dict[str, Any] = {"max_new_tokens": 4000, "temperature": 0.0}
"""Runs for seconds: this model's greedy text does not end by itself."""


@pytest.fixture(scope="module")
def endpoints(small_checkpoint: Path) -> Iterator[Endpoints]:
    config = ServeConfig(
        checkpoint=small_checkpoint.parents[1],
        name="poems",
        http_port=0,
        grpc_port=0,
        threads=1,
        engine=ENGINE,
        health=HealthConfig(period_s=1.0),
    )
    with running(config) as endpoints:
        yield endpoints


@pytest.fixture
def client(endpoints: Endpoints) -> Iterator[Client]:
    with Client(endpoints.grpc, timeout_s=60) as client:
        yield client


@pytest.fixture
def web(endpoints: Endpoints) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoints.http, timeout=60) as web:
        yield web


@pytest.fixture(scope="module")
def model(small_checkpoint: Path) -> gptmoe.LoadedModel:
    return gptmoe.load(small_checkpoint)


def test_the_served_text_is_the_cores(client: Client, model: gptmoe.LoadedModel) -> None:
    for sampling in ({"temperature": 0.0}, {"seed": 7, "top_k": 50}):
        expected = model.generate("春风", max_new_tokens=24, **sampling)
        answer = client.generate("春风", max_new_tokens=24, **sampling)
        chunks = list(client.stream("春风", max_new_tokens=24, **sampling))
        assert answer.text == expected
        assert "".join(chunk.text for chunk in chunks) == expected
        assert answer.token_ids == tuple(token for chunk in chunks for token in chunk.token_ids)
        assert answer.completion_tokens == len(answer.token_ids)
        assert [chunk.finish_reason for chunk in chunks[:-1]] == [""] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == answer.finish_reason == "length"
        assert (
            answer.prompt_tokens == chunks[0].prompt_tokens == len(model.tokenizer.encode("春风"))
        )


def test_http_gives_the_same_text(web: httpx.Client, model: gptmoe.LoadedModel) -> None:
    body: dict[str, Any] = {
        "inputs": ["春风"],
        "parameters": {"max_length": 24, "seed": 7, "top_k": 50},
    }
    said = model.generate("春风", max_new_tokens=24, seed=7, top_k=50)
    expected = ("春风" + said).replace("\n", "\\n")
    assert web.post("/generate", json=body).json() == {"text": expected}
    asked = {"prompt": "春风", "max_tokens": 24, "seed": 7, "top_k": 50}
    assert web.post("/v1/completions", json=asked).json()["choices"][0]["text"] == said
    with web.stream("POST", "/v1/completions", json=asked | {"stream": True}) as response:
        *pieces, done = [line for line in response.iter_lines() if line]
    chunks = [json.loads(piece.removeprefix("data: ")) for piece in pieces]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == said
    assert done == "data: [DONE]"
    with web.stream("POST", "/generate/stream", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "春风" + "".join(event["text"] for event in events) == expected
    assert events[-1]["finish_reason"] == "length"
    assert events[-1]["completion_tokens"] == 24


def test_a_stream_is_not_held_back(client: Client, web: httpx.Client) -> None:
    """The first piece comes long before the last."""

    def first_and_last_s(pieces: Iterator[Any]) -> tuple[float, float]:
        began_s = time.monotonic()
        next(pieces)
        first_s = time.monotonic() - began_s
        list(pieces)
        return first_s, time.monotonic() - began_s

    first_s, last_s = first_and_last_s(client.stream("春风", max_new_tokens=500, temperature=0.0))
    assert first_s < last_s / 4

    body = {"inputs": ["春风"], "parameters": {"max_length": 500, "temperature": 0}, "stream": True}
    with web.stream("POST", "/generate", json=body) as response:
        first_s, last_s = first_and_last_s(response.iter_lines())
    assert first_s < last_s / 4


def test_the_model_is_described(
    client: Client, web: httpx.Client, model: gptmoe.LoadedModel
) -> None:
    card = client.model()
    count = parameters(model.spec)
    assert (card.name, card.dtype) == ("poems", "float32")
    assert (card.parameters, card.active_parameters) == (count.total, count.active)
    assert (card.max_seq_len, card.num_experts) == (4096, (4,))
    assert card.vocab_size == model.tokenizer.vocab_size < model.spec.vocab_size
    assert web.get("/model").json()["parameters"] == count.total
    assert web.get("/healthz").json() == {"status": "ok"}


def test_reflection_lists_the_services(endpoints: Endpoints) -> None:
    with grpc.insecure_channel(endpoints.grpc) as channel:
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {"gptmoe.v1.Generation", "gptmoe.v1.ClusterControl"} <= set(services)


BAD = [
    ({"prompt": ""}, "prompt must be at least one character"),
    ({"prompt": "春风" * 4096}, "prompt must be at most 4095 tokens"),
    ({"prompt": "春", "max_new_tokens": -1}, "max_new_tokens must be at least 1; found -1"),
    ({"prompt": "春", "temperature": float("nan")}, "temperature must be between"),
    ({"prompt": "春", "top_p": 7.0}, "top_p must be above 0 and at most 1; found 7.0"),
    ({"prompt": "春", "stop": ["x"] * 10_000}, "stop must be at most 16"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD)
def test_bad_input_over_grpc(client: Client, call: dict[str, Any], sentence: str) -> None:
    for ask in (client.generate, lambda **given: list(client.stream(**given))):
        with pytest.raises(GenerationError) as error:
            ask(**call)
        assert error.value.code == "INVALID_ARGUMENT"
        assert sentence in error.value.message
        assert "\n" not in error.value.message


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"\x0a\x02\xff\xfe", "prompt must be UTF-8 text; found other bytes"),
        (b"\xff\xff\xff\xff", "not a gptmoe.v1.GenerateRequest"),
    ],
)
def test_unreadable_requests_over_grpc(endpoints: Endpoints, data: bytes, sentence: str) -> None:
    with grpc.insecure_channel(endpoints.grpc) as channel:
        unary = channel.unary_unary("/gptmoe.v1.Generation/Generate")
        streamed = channel.unary_stream("/gptmoe.v1.Generation/GenerateStream")
        for call in (lambda: unary(data, timeout=30), lambda: list(streamed(data, timeout=30))):
            with pytest.raises(grpc.RpcError) as error:
                call()
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert sentence in error.value.details()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"inputs": [""]}', "inputs must be at least one character"),
        (b'{"inputs": ["a", "b"]}', "inputs must hold at most 1, found 2"),
        (b'{"inputs": ["\xff"]}', "inputs.0 must be UTF-8 text"),
        (b"{", "the body is not valid JSON"),
        (b'{"inputs": ["a"], "parameters": {"max_length": -1}}', "max_length must be at least 1"),
        (b'{"inputs": ["a"], "parameters": {"top_p": NaN}}', "finite number"),
        (b'{"inputs": ["a"], "parameters": {"topk": 5}}', "parameters.topk is not a known field"),
    ],
)
def test_bad_input_over_http(web: httpx.Client, content: bytes, sentence: str) -> None:
    for path in ("/generate", "/generate/stream"):
        headers = {"content-type": "application/json"}
        response = web.post(path, content=content, headers=headers)
        assert response.status_code == 400
        assert sentence in response.json()["error"]["message"]


def test_a_hundred_megabytes_are_refused(web: httpx.Client) -> None:
    content = itertools.repeat(b" " * 2**20, 100)
    headers = {"content-type": "application/json"}
    response = web.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_large"
    assert web.get("/readyz").json() == {"status": "ok"}


def all_places_are_free(client: Client) -> bool:
    """Whether both slots and both places of the queue take a request now.

    Long enough that the four are there at once: else three places would serve them in turn.
    """

    def ask(_: int) -> bool:
        try:
            return bool(client.generate("春", max_new_tokens=60, temperature=0.0).token_ids)
        except GenerationError:
            return False

    with ThreadPoolExecutor(4) as pool:
        return all(pool.map(ask, range(4)))


def await_free_places(client: Client) -> None:
    """Within 4 s, when 4,000 tokens take longer."""
    deadline_s = time.monotonic() + 4
    while not all_places_are_free(client):
        assert time.monotonic() < deadline_s, "a cancelled request still holds its place"


def test_leaving_streams_frees_their_places(client: Client, web: httpx.Client) -> None:
    body = {
        "inputs": ["春风"],
        "parameters": {"max_length": 4000, "temperature": 0},
        "stream": True,
    }
    asked = {"prompt": "春风", "max_tokens": 4000, "temperature": 0, "stream": True}
    for path, sent in (("/generate", body), ("/v1/completions", asked)):
        stream = client.stream("春风", **LONG)
        next(stream)
        with web.stream("POST", path, json=sent) as response:
            next(response.iter_lines())
            assert not all_places_are_free(client)
        stream.close()
        await_free_places(client)


def test_leaving_before_an_answer_frees_its_place(client: Client, web: httpx.Client) -> None:
    asked = {"prompt": "春风", "max_tokens": 4000, "temperature": 0}
    for _ in range(4):
        with pytest.raises(httpx.ReadTimeout):
            web.post("/v1/completions", json=asked, timeout=0.5)
    await_free_places(client)


def test_every_one_of_many_leavers_frees_its_place(client: Client) -> None:
    """Leaving falls on any moment of the proxy's work, some of them rare."""
    for _ in range(40):
        stream = client.stream("春风", **LONG)
        next(stream)
        stream.close()
        await_free_places(client)


def test_expired_deadlines_free_their_places(endpoints: Endpoints, client: Client) -> None:
    def ask(_: int) -> str:
        with (
            Client(endpoints.grpc, timeout_s=0.5) as hasty,
            pytest.raises(GenerationError) as error,
        ):
            hasty.generate("春风", **LONG)
        return error.value.code

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(4))) == {"DEADLINE_EXCEEDED"}
    await_free_places(client)


def test_cancelled_tasks_free_their_places(endpoints: Endpoints, client: Client) -> None:
    async def cancel() -> None:
        async with AsyncClient(endpoints.grpc, timeout_s=60) as client:
            tasks = [asyncio.create_task(client.generate("春风", **LONG)) for _ in range(4)]
            await asyncio.sleep(0.5)
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in done)

    asyncio.run(cancel())
    await_free_places(client)


def test_overload_is_refused_and_the_rest_is_served(
    endpoints: Endpoints, client: Client, model: gptmoe.LoadedModel
) -> None:
    """Two slots and two places in the queue: of twelve at once some are refused, none is lost."""
    expected = model.generate("春风", max_new_tokens=300, temperature=0.0)

    def over_grpc(_: int) -> str:
        try:
            return client.generate("春风", max_new_tokens=300, temperature=0.0).text
        except GenerationError as error:
            return error.code

    def over_http(_: int) -> str:
        body = {"inputs": ["春风"], "parameters": {"max_length": 300, "temperature": 0}}
        response = httpx.post(f"{endpoints.http}/generate", json=body, timeout=60)
        if response.status_code == 200:
            return response.json()["text"].removeprefix("春风")
        return f"{response.status_code}, come back in {response.headers['retry-after']} s"

    with ThreadPoolExecutor(12) as pool:
        for ask, refusal in (
            (over_grpc, "RESOURCE_EXHAUSTED"),
            (over_http, "429, come back in 1 s"),
        ):
            answers = list(pool.map(ask, range(12)))
            assert set(answers) == {expected, refusal}
            assert answers.count(expected) >= 4
    await_free_places(client)


def test_a_running_request_id_is_refused(client: Client) -> None:
    stream = client.stream("春风", request_id="mine", **LONG)
    assert next(stream).request_id == "mine"
    with pytest.raises(GenerationError, match="ALREADY_EXISTS: request_id 'mine' is running"):
        client.generate("春风", request_id="mine", max_new_tokens=1)
    stream.close()


def test_names_in_the_dashboard_say_what_they_own(endpoints: Endpoints) -> None:
    status = ray.serve.status().applications[endpoints.name]
    assert list(status.deployments) == ["Generator"]
    actors = ray.util.state.list_actors(
        address=endpoints.dashboard, filters=[("state", "=", "ALIVE")]
    )
    assert any("poems:Generator" in actor.class_name for actor in actors)


def test_a_replica_that_dies_is_replaced(endpoints: Endpoints, client: Client) -> None:
    stream = client.stream("春风", **LONG)
    next(stream)
    (actor,) = [
        actor
        for actor in ray.util.state.list_actors(
            address=endpoints.dashboard, filters=[("state", "=", "ALIVE")], detail=True
        )
        if "poems:Generator" in actor.class_name
    ]
    ray.kill(ray.get_actor(actor.name, namespace="serve"), no_restart=True)
    with pytest.raises(GenerationError) as error:
        list(stream)
    assert error.value.code in ("INTERNAL", "UNAVAILABLE")

    deadline_s = time.monotonic() + 60
    while True:
        try:
            assert client.generate("春风", max_new_tokens=2).text
            return
        except GenerationError:
            assert time.monotonic() < deadline_s, "no new replica"
            time.sleep(0.5)
