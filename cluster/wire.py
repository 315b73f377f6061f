"""Control messages to bytes and back: one mapping, by field name (fields.py), for every message.

The only file of this folder, beside the gRPC client, that touches protobuf messages.
"""

import typing
from typing import TypeVar

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtoMessage

from cluster import fields, messages, operations
from gptmoe.errors import ClusterError, RequestError
from protos import control_pb2

A = TypeVar("A", bound=operations.Asked)

VERSION = 1
"""Of the control protocol: grows when an old peer could misread a message."""

_BODIES = {
    field.message_type.name: field.name
    for field in control_pb2.Envelope.DESCRIPTOR.oneofs_by_name["body"].fields
}


def encode(message: messages.Message) -> bytes:
    """The message in an envelope; raises ClusterError for a value that its field cannot hold."""
    envelope = control_pb2.Envelope(version=VERSION)
    body = getattr(envelope, _BODIES[type(message).__name__])
    body.SetInParent()
    try:
        fields.fill(body, message)
    except (TypeError, ValueError) as error:
        name = type(message).__name__
        raise ClusterError(f"control message {name} cannot be sent: {error}") from None
    data: bytes = envelope.SerializeToString(deterministic=True)
    return data


def decode(data: bytes) -> messages.Message:
    """The message in an envelope; raises ClusterError for malformed bytes or another version."""
    envelope = control_pb2.Envelope()
    try:
        envelope.ParseFromString(data)
    except (DecodeError, TypeError) as error:
        raise ClusterError(f"{len(data)} bytes are not a control message: {error}") from None
    if envelope.version != VERSION:
        raise ClusterError(
            f"control message of protocol version {envelope.version}, this side speaks {VERSION}; "
            "run the same gptmoe on all nodes"
        )
    body = envelope.WhichOneof("body")
    if body is None:
        raise ClusterError("control message without a known body; run the same gptmoe on all nodes")
    return typing.cast(messages.Message, fields.read(getattr(envelope, body)))


def parse(kind: type[A], data: bytes) -> A:
    """An operator's request from its bytes; raises RequestError if they are none."""
    proto = getattr(control_pb2, kind.__name__)
    try:
        return typing.cast(A, fields.read(proto.FromString(data)))
    except DecodeError as error:
        name = proto.DESCRIPTOR.full_name
        raise RequestError(f"the request is not a {name} with UTF-8 text: {error}") from None


def to_proto(answer: operations.Answered) -> ProtoMessage:
    """The message that answers an operator."""
    proto: ProtoMessage = getattr(control_pb2, type(answer).__name__)()
    fields.fill(proto, answer)
    return proto
