"""An engine without a model, so that these tests see the bridge and the front ends alone."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from gptmoe.errors import CheckpointError, Overloaded
from gptmoe.generate.delta import Delta
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request
from gptmoe.generate.stats import EngineStats
from serve.bridge import EngineThread
from serve.service import ModelCard, Service
from tests.characters import Characters

CARD = ModelCard(
    name="poems",
    parameters=1000,
    active_parameters=400,
    max_seq_len=64,
    vocab_size=0x110000,
    dtype="float32",
    num_layers=2,
    d_model=8,
    num_heads=2,
    num_experts=(4,),
)


class CountingEngine:
    """Continues any prompt with 一二三...: one token a character. `gate` holds its steps back."""

    def __init__(self, slots: int = 4, queue: int = 4) -> None:
        self.capacity = slots + queue
        self.requests: dict[str, Request] = {}
        self.produced: dict[str, int] = {}
        self.aborted: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.in_step = threading.Event()
        self.breaks = False
        self.spoilt = set[str]()
        """Requests whose scores are no numbers."""
        self.steps = self.generated = 0

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.requests),
            steps=self.steps,
            generated_tokens=self.generated,
        )

    def add(self, request: Request) -> None:
        if len(self.requests) >= self.capacity:
            raise Overloaded("the queue is full; try again later", 1.5)
        self.requests[request.request_id] = request
        self.produced[request.request_id] = 0

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.requests.pop(request_id, None)

    def end(self, request_id: str) -> list[Delta]:
        answers = self.requests[request_id].sampling.n
        self.abort(request_id)
        return [
            Delta(request_id=request_id, index=index, finish_reason="abort")
            for index in range(answers)
        ]

    def step(self) -> list[Delta]:
        self.in_step.set()
        assert self.gate.wait(10)
        if self.breaks:
            raise ZeroDivisionError("a bug")
        self.steps += 1
        self.generated += len(self.requests)
        return [self._next(request) for request in list(self.requests.values())]

    def _next(self, request: Request) -> Delta:
        if request.request_id in self.spoilt:
            del self.requests[request.request_id]
            error = CheckpointError("no numbers")
            return Delta(request_id=request.request_id, finish_reason="error", error=error)
        count = self.produced[request.request_id]
        self.produced[request.request_id] = count + 1
        text = "一二三四五六七八九十"[count % 10]
        reason = ""
        if text in request.sampling.stop:
            text, reason = "", "stop"
        elif count + 1 == request.sampling.max_new_tokens:
            reason = "length"
        if reason:
            del self.requests[request.request_id]
        token = ord(text or "。")
        return Delta(
            request_id=request.request_id,
            token_ids=(token,),
            text=text,
            finish_reason=reason,
            prompt_tokens=len(request.prompt_ids),
        )


def wait_until(condition: Callable[[], object], within_s: float = 5.0) -> None:
    """Wait for what another thread does."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "did not happen in time"
        time.sleep(0.002)


@pytest.fixture(name="wait_until")
def _wait_until() -> Callable[..., None]:
    return wait_until


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def bridge(engine: CountingEngine) -> Iterator[EngineThread]:
    bridge = EngineThread(engine)
    yield bridge
    engine.gate.set()
    bridge.stop()


@pytest.fixture
def service(bridge: EngineThread) -> Service:
    return Service(bridge, Characters(), CARD)


@pytest.fixture
def make_request() -> Callable[..., Request]:
    def make(request_id: str = "a", max_new_tokens: int = 3, stop: Sequence[str] = ()) -> Request:
        sampling = SamplingParams(max_new_tokens=max_new_tokens, stop=tuple(stop))
        return Request(request_id, (1, 2), sampling)

    return make
