"""The messages: what their fields promise, and that they travel."""

import importlib
import pickle
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor

ROOT = Path(__file__).parents[2]
PROTOS = sorted(path.stem for path in (ROOT / "protos").glob("*.proto"))


@pytest.mark.parametrize("name", PROTOS)
def test_enums_start_with_unspecified(name: str) -> None:
    descriptor = importlib.import_module(f"protos.{name}_pb2").DESCRIPTOR
    for enum in descriptor.enum_types_by_name.values():
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED")


def test_messages_travel_between_processes_by_pickle() -> None:
    messages = importlib.import_module("protos.generation_pb2")
    request = messages.GenerateRequest(prompt="春风", temperature=0.0, stop=["。"])
    assert pickle.loads(pickle.dumps(request)) == request


def test_every_sampling_parameter_knows_whether_it_was_given() -> None:
    messages = importlib.import_module("protos.generation_pb2")
    for field in messages.GenerateRequest.DESCRIPTOR.fields:
        if 10 <= field.number < 40 and not field.is_repeated:
            assert field.has_presence, field.name
            assert field.type != FieldDescriptor.TYPE_FLOAT, "HTTP sends doubles: the same text"
