"""Control messages survive the wire, and nothing else does."""

from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import messages, operations, wire
from cluster.messages import ExpertRange, Heartbeat, Owner, Shard, Topology
from gptmoe.errors import ClusterError, RequestError
from protos import control_pb2, generation_pb2

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.integers(0, 2**32 - 1)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type that the wire can carry."""
    if kind in BASIC:
        return BASIC[kind]
    if get_origin(kind) is tuple:
        return st.lists(values(get_args(kind)[0]), max_size=3).map(tuple)
    if get_origin(kind) is dict:
        return st.dictionaries(*map(values, get_args(kind)), max_size=3)
    hints = get_type_hints(kind)
    return st.builds(kind, **{field.name: values(hints[field.name]) for field in fields(kind)})


BASIC: dict[Any, st.SearchStrategy[Any]] = {
    str: names,
    int: numbers,
    bool: st.booleans(),
    float: st.floats(allow_nan=False),
}
messages_of_each_kind = st.one_of(*[values(kind) for kind in get_args(messages.Message)])


def test_a_topology_crosses_the_wire() -> None:
    shard = Shard(layers=(0, 1, 2, 3), experts=(ExpertRange(layer=1, first=0, end=4),))
    owner = Owner(worker="train-0", rank=0, node="诗", pid=7, shard=shard, counters={"loss": 2.5})
    topology = Topology(epoch=3, run="tiny", owners=(owner, replace(owner, worker="1", rank=1)))
    assert wire.decode(wire.encode(topology)) == topology


@given(messages_of_each_kind)
def test_every_message_comes_back_equal(message: messages.Message) -> None:
    assert wire.decode(wire.encode(message)) == message


def test_dataclasses_and_proto_messages_have_the_same_fields() -> None:
    in_proto = dict(control_pb2.DESCRIPTOR.message_types_by_name)
    bodies = {
        field.message_type.name for field in in_proto.pop("Envelope").fields if field.message_type
    }
    assert bodies == {cls.__name__ for cls in get_args(messages.Message)}
    for name, descriptor in in_proto.items():
        kind = getattr(messages, name, None) or getattr(operations, name)
        in_python = {field.name for field in fields(kind)}
        assert in_python == {field.name for field in descriptor.fields}, name


@given(st.one_of(*[values(kind) for kind in get_args(operations.Answered)]))
def test_every_answer_to_an_operator_arrives(answer: operations.Answered) -> None:
    sent = wire.to_proto(answer).SerializeToString()
    kind = getattr(control_pb2, type(answer).__name__)
    assert wire.fields.read(kind.FromString(sent)) == answer


@pytest.mark.parametrize("kind", get_args(operations.Asked))
def test_what_an_operator_asks_is_read_or_refused(kind: Any) -> None:
    asked = kind.__name__
    message = getattr(control_pb2, asked)()
    for field in fields(kind):
        value = {str: "诗", int: 3, bool: True, float: 0.5}[get_type_hints(kind)[field.name]]
        setattr(message, field.name, value)
    parsed = wire.parse(kind, message.SerializeToString())
    assert all(getattr(parsed, name.name) == getattr(message, name.name) for name in fields(kind))
    with pytest.raises(RequestError, match=f"not a gptmoe.v1.{asked}: "):
        wire.parse(kind, b"\xff\xff\xff\xff")


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (generation_pb2.GenerateRequest(model="poems", prompt="@@", seed=7), "prompt"),
        (generation_pb2.GenerateRequest(stop=["fine", "@@"], logit_bias={3: 1.0}), "stop"),
        (generation_pb2.GenerateRequest(prompt="春", request_id="@@"), "request_id"),
        (generation_pb2.ScoreRequest(prompt="春", continuations=["@@"]), "continuations"),
        (control_pb2.RefreshRequest(checkpoint="@@", within_s=1), "checkpoint"),
    ],
)
def test_a_text_that_is_no_utf8_is_named(message: Any, field: str) -> None:
    data = message.SerializeToString().replace(b"@@", b"\xb4\xba")  # 春 in GBK
    with pytest.raises(RequestError) as error:
        wire.request(type(message), data)
    assert error.value.field == field
    assert str(error.value) == f"{field} must be UTF-8 text; found other bytes"


@given(st.binary(max_size=64))
def test_random_bytes_are_a_request_or_a_refusal_of_it(data: bytes) -> None:
    with suppress(RequestError):
        wire.request(generation_pb2.GenerateRequest, data)


@given(st.binary(max_size=64))
def test_random_bytes_are_a_message_or_an_error(data: bytes) -> None:
    try:
        message = wire.decode(data)
    except ClusterError:
        return
    assert wire.decode(wire.encode(message)) == message


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xff\xff\xff", "3 bytes are not a control message"),
        (
            control_pb2.Envelope(version=9).SerializeToString(),
            "protocol version 9, this side speaks 1",
        ),
        (control_pb2.Envelope(version=1).SerializeToString(), "without a known body"),
    ],
)
def test_malformed_bytes_are_named(data: bytes, expected: str) -> None:
    with pytest.raises(ClusterError, match=expected):
        wire.decode(data)


@pytest.mark.parametrize("wrong", [{"step": -1}, {"step": 2**64}, {"worker": 5}])
def test_a_value_that_does_not_fit_is_refused(wrong: dict[str, Any]) -> None:
    heartbeat = Heartbeat(epoch=1, sequence=1, worker="a", step=1)
    with pytest.raises(ClusterError, match="Heartbeat cannot be sent"):
        wire.encode(replace(heartbeat, **wrong))
