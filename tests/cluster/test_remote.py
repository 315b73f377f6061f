"""A server's answers and refusals, from a real gRPC server in this process."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields
from threading import Semaphore

import grpc
import pytest

from cluster.client import GenerationError, Sampling
from cluster.prompts import Item
from cluster.remote import Remote, _asked, operating
from gptmoe.errors import ClusterError, RequestError
from gptmoe.generate.params import SamplingParams
from protos import generation_pb2, generation_pb2_grpc


class Echo(generation_pb2_grpc.GenerationServicer):
    """Answers with what it was asked; some prompts fail."""

    def __init__(self) -> None:
        self.fast = Semaphore(0)
        self.full = 2  # times

    def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> generation_pb2.GenerateResponse:
        if request.prompt == "refuse":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "top_k must be at least 0")
        if request.prompt == "break":
            context.abort(grpc.StatusCode.INTERNAL, "out of memory")
        if (request.prompt == "full" and self.full) or request.prompt == "always full":
            self.full -= 1
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "come back later")
        if request.prompt == "fast":
            self.fast.release()
        if request.prompt == "slow":  # until 99 fast ones have been answered
            assert all(self.fast.acquire(timeout=10) for _ in range(99))
        stop, most = "|".join(request.stop), request.max_new_tokens or 128
        text = f"{request.prompt}:{request.seed}:{request.top_k}:{stop}:{most}"
        return generation_pb2.GenerateResponse(text=text)

    def GenerateStream(
        self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[generation_pb2.GenerateChunk]:
        for character in request.prompt:
            yield generation_pb2.GenerateChunk(text=character)


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(8))
    generation_pb2_grpc.add_GenerationServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(grace=None).wait()


def test_each_prompt_of_many_is_answered(target: str) -> None:
    sampling = SamplingParams(seed=7, top_k=5, stop=("。", "\n"))
    with closing(Remote(target, sampling)) as remote:
        items = [Item(number, f"prompt {number}") for number in range(20)]
        said = dict(remote.generate([*items, Item("short", "few", max_new_tokens=3)]))
        assert said == {
            **{number: f"prompt {number}:7:5:。|\n:128" for number in range(20)},
            20: "few:7:5:。|\n:3",
        }
        assert list(remote.stream("春风")) == ["春", "风"]


def test_who_leaves_does_not_wait_for_room(target: str) -> None:
    began_s = time.monotonic()
    with closing(Remote(target, SamplingParams())) as remote:
        answers = remote.generate([Item(1, "fine"), Item(2, "always full")])
        next(answers)
        answers.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began_s < 60


def test_a_slow_answer_holds_up_none_of_the_others(target: str) -> None:
    with closing(Remote(target, SamplingParams())) as remote:
        items = [Item(0, "slow"), *(Item(number, "fast") for number in range(1, 100))]
        came = [index for index, _ in remote.generate(items)]
    assert sorted(came) == list(range(100))
    assert 0 in came[90:]


def test_every_way_to_sample_is_sent() -> None:
    """What is left out is the default of the server too."""
    assert _asked(SamplingParams()) == {"seed": 0}
    params = SamplingParams(temperature=0, num_beams=2, logit_bias=((3, 1.5),), stop=("。",))
    assert _asked(params) == {
        "temperature": 0,
        "num_beams": 2,
        "logit_bias": {3: 1.5},
        "stop": ("。",),
        "seed": 0,
    }
    assert {field.name for field in fields(SamplingParams)} <= set(Sampling.__annotations__)


def test_what_a_server_refuses_is_in_our_words(target: str) -> None:
    with closing(Remote(target, SamplingParams())) as remote:
        items = [Item(1, "refuse"), Item(2, "break"), Item(3, "fine")]
        refused, broken, text = (answer for _, answer in sorted(remote.generate(items)))
    assert isinstance(refused, RequestError)
    assert str(refused) == "top_k must be at least 0"
    assert isinstance(broken, ClusterError)
    assert f"server at {target} failed: INTERNAL: out of memory" in str(broken)
    assert text == "fine:0:0::128"


def test_a_full_queue_is_come_back_to(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.remote._AGAIN_S", 0.01)
    with closing(Remote(target, SamplingParams())) as remote:
        assert list(remote.generate([Item(1, "full")])) == [(0, "full:0:0::128")]
        monkeypatch.setattr("cluster.remote._FULL_S", -1.0)
        ((_, answer),) = remote.generate([Item(1, "always full")])
    assert isinstance(answer, ClusterError)
    assert "RESOURCE_EXHAUSTED: come back later" in str(answer)


@pytest.mark.parametrize(
    ("code", "message", "expected"),
    [
        ("UNAVAILABLE", "poems takes no new requests: it is drained", "^poems takes no new requ"),
        (
            "NOT_FOUND",
            "Application metadata not set.",
            "no such application, or several of them: --name",
        ),
        ("UNAUTHENTICATED", "a key is wanted", "a key is wanted; --token-file names a file"),
        ("PERMISSION_DENIED", "Drain wants an operator's key", "1:1: Drain wants an operator's k"),
        ("ABORTED", "another operator wants 4 replicas", "^another operator"),
    ],
)
def test_what_a_server_says_itself_is_passed_on(code: str, message: str, expected: str) -> None:
    with pytest.raises(ClusterError, match=expected), operating("127.0.0.1:1"):
        raise GenerationError(code, message)


def test_a_server_that_is_away_is_named() -> None:
    with (
        closing(Remote("127.0.0.1:1", SamplingParams())) as remote,
        pytest.raises(ClusterError, match=r"no server answers at 127.0.0.1:1 .*; is it running\?"),
    ):
        list(remote.stream("春风"))
