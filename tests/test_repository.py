"""The repository itself: sizes, borders, words, and that what is shipped loads."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import pytest
from grpc_tools import protoc
from packaging.requirements import Requirement

import gptmoe
from gptmoe.config import load

ROOT = Path(__file__).parent.parent
PACKAGES = ("gptmoe", "protos", "cluster", "train", "serve")
SOURCES = sorted(
    path.relative_to(ROOT)
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if "_pb2" not in path.name
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60

CORE_NEEDS = {"torch", "numpy", "safetensors", "tokenizers", "jieba", "pyarrow"}
"""All that gptmoe/ may import from outside the standard library."""

LIGHT = ("errors", "config", "metrics", "model.spec", "model.presets", "model.counts")
"""Modules of gptmoe that load in milliseconds: nothing behind them may import torch."""

SAY_INSTEAD = {
    "dp": r"dp_size|data_parallel_size",
    "tp": r"tp_size|tensor_model_parallel_size|tensor_parallel_size",
    "ep": r"ep_size|expert_parallel_size|expert_model_parallel_size",
    "pp": r"pp_size|pipeline_model_parallel_size|pipeline_parallel_size",
    "num_layers": r"n_layers?|num_hidden_layers",
    "num_heads": r"n_heads?|num_attention_heads",
    "num_experts": r"n_experts?|num_local_experts",
    "d_model": r"n_embd|hidden_size|hidden_dim|embed_dim",
    "d_ff": r"n_inner|ffn_dim|intermediate_size|ffn_hidden_size",
    "max_seq_len": r"n_positions|n_ctx|max_position_embeddings|max_sequence_length",
    "seq_len": r"seq_length|sequence_length",
    "microbatch": r"micro_batch|micro_batch_size",
}
"""One word per idea, from TOML key to metric: the word, and what not to write for it."""

SPEAKS_HUGGING_FACE = {"gptmoe/checkpoint/huggingface.py"}
COMES_WITH_TORCH = {"triton"}
"""For CUDA torch brings the version that it was built with; nothing else may ask for another."""
"""Files that map foreign names to ours."""


def tree(source: Path) -> ast.Module:
    return ast.parse((ROOT / source).read_text(encoding="utf-8"))


def imported_from_outside(source: Path) -> Iterator[str]:
    for node in ast.walk(tree(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        yield from {name.partition(".")[0] for name in names} - sys.stdlib_module_names


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_comes_from_this_checkout(name: str) -> None:
    file = importlib.import_module(name).__file__
    assert file
    assert Path(file).is_relative_to(ROOT)


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_files_and_functions_are_short(source: Path) -> None:
    assert len((ROOT / source).read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


def with_torch(source: Path) -> set[str]:
    """What a source may import because it is only used where torch has brought it."""
    return COMES_WITH_TORCH if source.parent == Path("gptmoe/generate/gpu") else set()


@pytest.mark.parametrize("source", [s for s in SOURCES if s.parts[0] == "gptmoe"], ids=str)
def test_the_core_needs_few_packages(source: Path) -> None:
    assert set(imported_from_outside(source)) - with_torch(source) <= CORE_NEEDS | {"gptmoe"}


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_every_import_is_a_declared_dependency(source: Path) -> None:
    declared = {Requirement(line).name for line in PROJECT["dependencies"]}
    renamed = {
        "google": "protobuf",
        "grpc": "grpcio",
        "grpc_health": "grpcio-health-checking",
        "grpc_reflection": "grpcio-reflection",
        "grpc_status": "grpcio-status",
        "starlette": "fastapi",
    }
    names = set(imported_from_outside(source)) - set(PACKAGES) - with_torch(source)
    assert {renamed.get(name, name.replace("_", "-")) for name in names} <= declared


def test_light_modules_load_without_torch() -> None:
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    code += "    print(name, *{'torch', 'numpy', 'ray'} & set(sys.modules))"
    names = [f"gptmoe.{name}" for name in LIGHT]
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == names


@pytest.mark.parametrize("word", SAY_INSTEAD)
def test_one_word_per_idea(word: str) -> None:
    files = [s for s in SOURCES if str(s) not in SPEAKS_HUGGING_FACE]
    files += [p.relative_to(ROOT) for p in ROOT.glob("configs/**/*.toml")]
    files += [p.relative_to(ROOT) for p in ROOT.glob("protos/*.proto")]
    banned = re.compile(rf"\b(?:{SAY_INSTEAD[word]})\b")
    found = [str(f) for f in files if banned.search((ROOT / f).read_text(encoding="utf-8"))]
    assert not found, f"say {word}"


def test_public_names_of_gptmoe_are_exact() -> None:
    own = {
        name
        for name, value in vars(gptmoe).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("gptmoe")
    }
    assert own <= set(gptmoe.__all__)
    assert list(gptmoe.__all__) == sorted(gptmoe.__all__)
    for name in gptmoe.__all__:
        assert getattr(gptmoe, name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize(
    ("path", "module", "name", "overrides"),
    [
        (path.relative_to(ROOT), module, name, overrides)
        for folder, module, name, overrides in (
            ("train", "train.config", "TrainConfig", []),
            ("study", "train.study.config", "StudyConfig", []),
            ("serve", "serve.config", "ServeConfig", ["checkpoint=runs/tiny"]),
        )
        if find_spec(module)
        for path in sorted((ROOT / "configs" / folder).glob("*.toml"))
    ],
    ids=str,
)
def test_a_shipped_config_loads(path: Path, module: str, name: str, overrides: list[str]) -> None:
    config_class = getattr(importlib.import_module(module), name)
    assert isinstance(load(config_class, ROOT / path, overrides), config_class)


def test_generated_messages_are_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("protos/*.proto"))
    services = [source for source in sources if "\nservice " in Path(source).read_text()]
    command = ["protoc", "-I.", f"-I{resources.files('grpc_tools') / '_proto'}"]
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi")]
    assert protoc.main([*command, *out, *sources]) == 0
    assert protoc.main([*command, f"--grpc_python_out={tmp_path}", *services]) == 0
    fresh = {path.name: path.read_text() for path in (tmp_path / "protos").iterdir()}
    assert fresh == {path.name: path.read_text() for path in ROOT.glob("protos/*_pb2*.py*")}, (
        "run `make protos`"
    )


def test_every_dependency_has_one_tested_version() -> None:
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for requirement in map(Requirement, wanted):
        if requirement.name in COMES_WITH_TORCH:
            continue
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_no_package_under_tests_hides_the_one_it_is_named_after() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
