"""Any bytes, and any values of any field, to every gRPC method: refused in words, never a fault.

Deterministic (tests/conftest.py), and bounded by the number of examples: some 15 s in all.
"""

import asyncio
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptmoe.model.spec import ModelSpec
from gptmoe.text import load_tokenizer
from protos import control_pb2 as control
from protos import generation_pb2 as messages
from serve.bridge import EngineThread
from serve.checkpoints import Interchangeable
from serve.controller import Settings, State
from serve.operations import Operations
from serve.service import Service

from .conftest import CARD
from .full_engine import FullEngine
from .grpc_server import serving

DESCRIBED = {
    method.name: method
    for file, name in ((messages, "Generation"), (control, "ClusterControl"))
    for method in file.DESCRIPTOR.services_by_name[name].methods
    if method.name != "WatchTopology"  # it never ends
}
METHODS = sorted(DESCRIBED)
FINE = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED"}
WITHIN_S = 20
_GRPCS = "Deadline Exceeded"
"""What gRPC itself says of a deadline."""
VALID = {
    "GenerateRequest": messages.GenerateRequest(
        prompt="春风又绿江南岸",
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        seed=7,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={3: 1.5},
        n=2,
        max_new_tokens=4,
        stop_token_ids=[9],
        model="poems",
        deadline_ms=60_000,
        priority=3,
        logprobs=True,
        top_logprobs=2,
        prompt_logprobs=True,
    ),
    "ScoreRequest": messages.ScoreRequest(prompt="春", continuations=["风", "雨"], priority=-1),
    "TokenizeRequest": messages.TokenizeRequest(text="春风"),
    "DetokenizeRequest": messages.DetokenizeRequest(token_ids=[26, 39]),
    "GetModelRequest": messages.GetModelRequest(model="poems"),
    "ListModelsRequest": messages.ListModelsRequest(),
    "AbortRequest": messages.AbortRequest(request_id="mine"),
    "ControlQuery": control.ControlQuery(),
    "DrainRequest": control.DrainRequest(resume=True, within_s=9.0),
    "RefreshRequest": control.RefreshRequest(checkpoint="/nowhere", restart=True, within_s=9.0),
    "ScaleRequest": control.ScaleRequest(replicas=2, within_s=9.0),
}
EXAMPLES = settings(max_examples=40, database=None, suppress_health_check=[HealthCheck.too_slow])


class Application:
    """Does at once what its operators say."""

    name = "poems"

    def __init__(self) -> None:
        self._now = State(
            settings=Settings(checkpoint="/a"), status="RUNNING", message="",
            states={"0": "RUNNING"}, wanted=1, scales_itself=False,
        )  # fmt: skip

    def state(self) -> State:
        return self._now

    def change(self, settings: Settings) -> None:
        self._now = replace(self._now, settings=settings)

    def scale(self, replicas: int) -> None:
        states = {str(number): "RUNNING" for number in range(replicas)}
        self._now = replace(self._now, wanted=replicas, states=states)


class Server:
    """The service in a thread of its own, and a channel to it."""

    def __init__(self) -> None:
        self.engine = FullEngine(most_tokens=8)
        self.bridge = EngineThread(self.engine)
        self._ready, self._target = threading.Event(), ""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(10)
        self.channel = grpc.insecure_channel(self._target)

    async def _serve(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        words = load_tokenizer(Path(__file__).parents[2] / "configs" / "corpus")
        card = replace(CARD, vocab_size=words.vocab_size)
        service = Service(self.bridge, words, card)
        spec = ModelSpec(num_layers=1, d_model=8, num_heads=1, d_ff=16)
        alike = Interchangeable(spec, words.digest, Path("/nowhere"))
        operations = Operations(Application(), me="0", check=alike.check, topologies=lambda _: ())
        async with serving(service, operations) as self._target:
            self._ready.set()
            await self._over.wait()

    def call(self, method: str, data: bytes) -> str:
        """The status of a call; LATE if no answer came in WITHIN_S."""
        described = DESCRIBED[method]
        path = f"/{described.containing_service.full_name}/{method}"
        try:
            if described.server_streaming:
                list(self.channel.unary_stream(path)(data, timeout=WITHIN_S))
            else:
                self.channel.unary_unary(path)(data, timeout=WITHIN_S)
        except grpc.RpcError as error:
            return "LATE" if error.details() == _GRPCS else str(error.code().name)
        return "OK"

    def close(self) -> None:
        self.channel.close()
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)
        self.bridge.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)  # refusals of streams
    server = Server()
    yield server
    server.close()


def asked(method: str) -> Any:
    """The class of a method's request."""
    return GetMessageClass(DESCRIBED[method].input_type)


def values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Any value of one item of a field, its type's ends before all."""
    kinds = FieldDescriptor
    bits = 64 if field.cpp_type == kinds.CPPTYPE_INT64 else 32
    most = 2 ** (bits - 1)
    if field.cpp_type in (kinds.CPPTYPE_INT32, kinds.CPPTYPE_INT64):
        ends = st.sampled_from([0, 1, 2, 64, -1, most - 1, -most, 0xD800, 0x10FFFF])
        return ends | st.integers(-most, most - 1)
    if field.cpp_type == kinds.CPPTYPE_UINT32:
        return st.sampled_from([0, 1, 10_000, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)
    if field.cpp_type == kinds.CPPTYPE_DOUBLE:
        ends = st.sampled_from([0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf"), 5e-324])
        return ends | st.floats()
    if field.cpp_type == kinds.CPPTYPE_BOOL:
        return st.booleans()
    assert field.cpp_type == kinds.CPPTYPE_STRING, f"{field.full_name} is of a new type"
    short = ["", "春风", "poems", "\0", "\U0010ffff"]
    long = ["长" * 63, "长" * 64, "长" * 4097, "/" + "a" * 5000]
    return st.sampled_from(short + long) | st.text(max_size=20)


@st.composite
def filled(draw: st.DrawFn, kind: Any) -> Message:
    """A valid message with some of its fields at any value."""
    message = VALID[kind.DESCRIPTOR.name].__class__()
    message.CopyFrom(VALID[kind.DESCRIPTOR.name])
    names = st.sets(st.sampled_from([it.name for it in kind.DESCRIPTOR.fields]), max_size=3)
    for name in sorted(draw(names)) if kind.DESCRIPTOR.fields else ():
        field = kind.DESCRIPTOR.fields_by_name[name]
        message.ClearField(name)
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
            given = draw(st.dictionaries(values(key), values(value), max_size=3))
            getattr(message, name).update(given)
        elif field.is_repeated:
            few = draw(st.lists(values(field), max_size=4))
            getattr(message, name).extend(few * draw(st.sampled_from([1, 1, 5, 17])))
        else:
            setattr(message, name, draw(values(field)))
    return message


@st.composite
def mutated(draw: st.DrawFn, kind: Any) -> bytes:
    """The bytes of a valid message with some of them lost, changed or brought in."""
    data = bytearray(VALID[kind.DESCRIPTOR.name].SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        new = draw(st.binary(max_size=3))
        data[at : at + draw(st.integers(0, 3))] = new
    return bytes(data)


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
@EXAMPLES
def test_any_bytes(server: Server, method: str, data: st.DataObject) -> None:
    assert server.call(method, data.draw(st.binary(max_size=64))) in FINE


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
@EXAMPLES
def test_mutated_messages(server: Server, method: str, data: st.DataObject) -> None:
    assert server.call(method, data.draw(mutated(asked(method)))) in FINE


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
@EXAMPLES
def test_any_field_values(server: Server, method: str, data: st.DataObject) -> None:
    message = data.draw(filled(asked(method)))
    assert server.call(method, message.SerializeToString()) in FINE


@pytest.mark.parametrize("method", METHODS)
def test_the_server_still_answers(server: Server, method: str) -> None:
    """After all of the above: what is right is answered, and nothing is left behind."""
    expected = {"Abort": "NOT_FOUND", "Refresh": "INVALID_ARGUMENT"}.get(method, "OK")
    valid = VALID[asked(method).DESCRIPTOR.name]
    assert server.call(method, valid.SerializeToString()) == expected
    assert not server.engine.has_work
    server.bridge.check(stall_s=1)


def test_a_body_of_100_mb_is_refused_and_the_next_is_answered(server: Server) -> None:
    for method in ("Generate", "GenerateStream"):
        assert server.call(method, b"\x0a" + bytes(10**8)) == "RESOURCE_EXHAUSTED"
        assert server.call("GetModel", b"") == "OK"
