"""The generated code is what the .proto files say."""

import importlib
import pickle
import re
from importlib.resources import files
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
PROTOS = sorted(path.stem for path in (ROOT / "protos").glob("*.proto"))


@pytest.mark.parametrize("name", PROTOS)
def test_generated_code_is_up_to_date(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    arguments = ["protoc", "-I.", f"-I{files('grpc_tools') / '_proto'}"]
    arguments += [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    has_service = re.search(r"^service ", Path(f"protos/{name}.proto").read_text(), re.MULTILINE)
    if has_service:
        arguments.append(f"--grpc_python_out={tmp_path}")
    assert protoc.main([*arguments, f"protos/{name}.proto"]) == 0

    fresh = {path.name: path.read_bytes() for path in (tmp_path / "protos").iterdir()}
    checked_in = {
        path.name: path.read_bytes()
        for pattern in (f"{name}_pb2.*", f"{name}_pb2_grpc.py")
        for path in Path("protos").glob(pattern)
    }
    assert fresh.keys() == checked_in.keys()
    for file, content in fresh.items():
        assert content == checked_in[file], f"protos/{file} is stale: see protos/README.md"


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
