"""Control messages to bytes and back: one mapping, by field name, for every message.

The only file of this folder, beside the gRPC client, that touches protobuf.
"""

import typing
from dataclasses import fields
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtoMessage

from cluster import messages
from gptmoe.errors import ClusterError
from protos import control_pb2

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
        _fill(body, message)
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
    return typing.cast(messages.Message, _read(getattr(envelope, body)))


def _fill(proto: ProtoMessage, value: Any) -> None:
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, tuple) and item and isinstance(item[0], int):
            getattr(proto, field.name).extend(item)
        elif isinstance(item, tuple):
            for part in item:
                _fill(getattr(proto, field.name).add(), part)
        elif isinstance(item, dict):
            getattr(proto, field.name).update(item)
        elif hasattr(item, "__dataclass_fields__"):
            getattr(proto, field.name).SetInParent()
            _fill(getattr(proto, field.name), item)
        else:
            setattr(proto, field.name, item)


def _read(proto: ProtoMessage) -> Any:
    cls = getattr(messages, proto.DESCRIPTOR.name)
    return cls(**{field.name: _value(proto, field) for field in proto.DESCRIPTOR.fields})


def _value(proto: ProtoMessage, field: FieldDescriptor) -> Any:
    value, kind = getattr(proto, field.name), field.message_type
    if kind is None:
        return tuple(value) if field.is_repeated else value
    if kind.GetOptions().map_entry:
        return dict(value)
    return tuple(_read(item) for item in value) if field.is_repeated else _read(value)
