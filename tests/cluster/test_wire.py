"""Control messages survive the wire, and nothing else does."""

from dataclasses import fields, replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import messages, wire
from cluster.messages import ExpertRange, Heartbeat, Owner, Shard, Topology
from gptmoe.errors import ClusterError
from protos import control_pb2

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.integers(0, 2**32 - 1)
ranges = st.builds(ExpertRange, layer=numbers, first=numbers, end=numbers)
shards = st.builds(
    Shard,
    stage=numbers,
    layers=st.lists(numbers, max_size=3).map(tuple),
    slice=numbers,
    slices=numbers,
    experts=st.lists(ranges, max_size=3).map(tuple),
)
counters = st.dictionaries(names, st.floats(allow_nan=False), max_size=3)
owners = st.builds(
    Owner,
    worker=names,
    rank=numbers,
    node=names,
    pid=numbers,
    shard=shards,
    step=numbers,
    heartbeat_age_s=st.floats(0, 1e9),
    counters=counters,
)
messages_of_each_kind = st.one_of(
    st.builds(messages.Begin, group=names),
    st.builds(messages.Begun, epoch=numbers),
    st.builds(
        messages.Register,
        epoch=numbers,
        sequence=numbers,
        worker=names,
        rank=numbers,
        node=names,
        pid=numbers,
        shard=shards,
        digest=names,
    ),
    st.builds(
        messages.Heartbeat,
        epoch=numbers,
        sequence=numbers,
        worker=names,
        step=numbers,
        counters=counters,
    ),
    st.builds(messages.TopologyRequest),
    st.builds(
        messages.Topology,
        epoch=numbers,
        run=names,
        owners=st.lists(owners, max_size=2).map(tuple),
    ),
    st.builds(messages.Accepted, epoch=numbers),
    st.builds(messages.Failure, epoch=numbers, reason=names),
    st.builds(messages.Refusal, epoch=numbers, reason=names),
)


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
        in_python = {field.name for field in fields(getattr(messages, name))}
        assert in_python == {field.name for field in descriptor.fields}, name


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
