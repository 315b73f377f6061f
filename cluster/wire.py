"""Control messages to bytes and back: one mapping, by field name (fields.py), for every message.

The only file of this folder, beside the gRPC client, that touches protobuf messages.
"""

import typing
from typing import TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.unknown_fields import UnknownFieldSet

from cluster import fields, messages, operations
from gptmoe.errors import ClusterError, RequestError
from protos import control_pb2

A = TypeVar("A", bound=operations.Asked)
M = TypeVar("M", bound=ProtoMessage)

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
    """An operator's request from its bytes; raises RequestError as `request`."""
    return typing.cast(A, fields.read(request(getattr(control_pb2, kind.__name__), data)))


def request(kind: type[M], data: bytes) -> M:
    """A request from its bytes; raises RequestError if they are none, for the field if it can."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        if field := _not_utf8(kind, data):
            raise RequestError(f"{field} must be UTF-8 text; found other bytes", field) from None
        name = kind.DESCRIPTOR.full_name
        raise RequestError(f"the request is not a {name}: {error}") from None


def _not_utf8(kind: type[ProtoMessage], data: bytes) -> str:
    """The first text of a message that is no UTF-8, which protobuf does not name; empty: none is.

    To a message without fields all of them are unknown, and so are kept as they came.
    """
    raw = Empty()
    try:
        raw.ParseFromString(data)
    except DecodeError:
        return ""
    texts = {it.number: it.name for it in kind.DESCRIPTOR.fields if it.type == it.TYPE_STRING}
    for unknown in UnknownFieldSet(raw):
        if unknown.field_number in texts and isinstance(unknown.data, bytes):
            try:
                unknown.data.decode()
            except UnicodeDecodeError:
                return texts[unknown.field_number]
    return ""


def to_proto(answer: operations.Answered) -> ProtoMessage:
    """The message that answers an operator."""
    proto: ProtoMessage = getattr(control_pb2, type(answer).__name__)()
    fields.fill(proto, answer)
    return proto
