"""Dataclasses of messages.py and operations.py to protobuf messages and back, by field name.

Needs protobuf only, as the gRPC client does: which messages there are, its callers know.
"""

import dataclasses
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as ProtoMessage

from . import messages, operations

_KINDS = {**vars(messages), **vars(operations)}


def fill(proto: ProtoMessage, value: Any) -> None:
    """Set the fields of a message; raises TypeError or ValueError for what one cannot hold."""
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if isinstance(item, tuple) and item and dataclasses.is_dataclass(item[0]):
            for part in item:
                fill(getattr(proto, field.name).add(), part)
        elif isinstance(item, tuple):
            getattr(proto, field.name).extend(item)
        elif isinstance(item, dict):
            getattr(proto, field.name).update(item)
        elif hasattr(item, "__dataclass_fields__"):
            getattr(proto, field.name).SetInParent()
            fill(getattr(proto, field.name), item)
        else:
            setattr(proto, field.name, item)


def read(proto: ProtoMessage) -> Any:
    """The dataclass that is called as the message is."""
    cls = _KINDS[proto.DESCRIPTOR.name]
    return cls(**{field.name: _value(proto, field) for field in proto.DESCRIPTOR.fields})


def _value(proto: ProtoMessage, field: FieldDescriptor) -> Any:
    value, kind = getattr(proto, field.name), field.message_type
    if kind is None:
        return tuple(value) if field.is_repeated else value
    if kind.GetOptions().map_entry:
        return dict(value)
    return tuple(read(item) for item in value) if field.is_repeated else read(value)
