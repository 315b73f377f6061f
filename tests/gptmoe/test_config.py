"""gptmoe.config: TOML to frozen dataclasses, overrides, and every message."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from gptmoe.config import (
    INPUT_PATH,
    Location,
    Uri,
    build,
    digest,
    load,
    override,
    parse_override,
    to_dict,
)
from gptmoe.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    num_layers: int
    num_experts: int | tuple[int, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ConfigError(f"model.num_layers={self.num_layers} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    model: Model
    kind: Literal["small", "large"] = "small"
    name: str = ""
    steps: int | None = None
    resume: bool = False
    data: Location | None = field(default=None, metadata=INPUT_PATH)
    output: Path = Path("runs")
    columns: dict[str, str] = field(default_factory=dict)
    others: tuple[Path, ...] = field(default=(), metadata=INPUT_PATH)


TOML = """
kind = "large"
data = "poems.tsv"
[model]
num_layers = 2
num_experts = [4, 8]
[columns]
text = "poem"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(TOML, encoding="utf-8")
    return file


def test_a_file_and_overrides_become_a_config(path: Path) -> None:
    config = load(Config, path, ["model.num_layers=4", "model.dropout=0", "name=春"])
    assert config.model == Model(num_layers=4, num_experts=(4, 8), dropout=0.0)
    assert (config.kind, config.name, config.columns) == ("large", "春", {"text": "poem"})


def test_without_a_file_overrides_alone_make_it() -> None:
    assert load(Config, None, ["model.num_layers=1"]) == Config(model=Model(num_layers=1))


def test_the_last_override_wins(path: Path) -> None:
    assert load(Config, path, ["steps=1", "steps=2"]).steps == 2


def test_an_override_of_a_table_leaves_its_other_keys(path: Path) -> None:
    assert load(Config, path, ["model={num_layers=7}"]).model.num_experts == (4, 8)


def test_input_paths_are_relative_to_the_file_they_stand_in(path: Path) -> None:
    assert load(Config, path).data == path.parent / "poems.tsv"
    assert load(Config, path, ["data=poems.tsv"]).data == Path("poems.tsv")
    assert load(Config, path).output == Path("runs")


def test_a_list_of_input_paths_is_relative_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('others = ["a.txt", "/b.txt"]\n[model]\nnum_layers = 1\n', encoding="utf-8")
    assert load(Config, file).others == (tmp_path / "a.txt", Path("/b.txt"))
    assert load(Config, file, ['others=["c.txt"]']).others == (Path("c.txt"),)


def test_a_config_is_overridden_as_a_file_is(path: Path) -> None:
    config = load(Config, path)
    changed = override(config, ["model.num_layers=3", "model.num_layers=5", "steps=7"])
    assert (changed.model, changed.steps) == (Model(num_layers=5, num_experts=(4, 8)), 7)
    assert (changed.kind, changed.data, changed.columns) == ("large", config.data, {"text": "poem"})
    with pytest.raises(ConfigError, match=r"unknown config key model.layers"):
        override(config, ["model.layers=3"])


def test_a_uri_stays_as_it_is_and_that_of_a_file_is_its_path(path: Path) -> None:
    written = ["s3://bucket/a//b.tsv?region=here", "hdfs:///a.tsv", "gs://bucket/a"]
    for uri in written:
        config = load(Config, path, [f"data={uri}"])
        assert isinstance(config.data, Uri)
        assert config.data == uri
        assert build(Config, to_dict(config)) == config
    path.write_text(TOML.replace("poems.tsv", "s3://bucket/poems.tsv"), encoding="utf-8")
    assert load(Config, path).data == Uri("s3://bucket/poems.tsv")
    words = ["data=file:///shared/%E6%98%A5%20a", "output=file://localhost/shared/runs"]
    config = load(Config, path, words)
    assert (config.data, config.output) == (Path("/shared/春 a"), Path("/shared/runs"))


@pytest.mark.parametrize(
    ("line", "plain"),
    [
        ("parallel.ep=2", {"parallel": {"ep": 2}}),
        ("run.dir=runs/a", {"run": {"dir": "runs/a"}}),
        ('run.dir="runs/a"', {"run": {"dir": "runs/a"}}),
        ("run.dir=a=b", {"run": {"dir": "a=b"}}),
        ("name=", {"name": ""}),
        ("name=静夜思", {"name": "静夜思"}),
        ("rate=1e-4", {"rate": 1e-4}),
        ("resume=true", {"resume": True}),
        ("list=[1, 2]", {"list": [1, 2]}),
    ],
)
def test_overrides_are_toml_and_strings_need_no_quotes(line: str, plain: dict[str, Any]) -> None:
    assert parse_override(line) == plain


def test_a_config_survives_plain_data(path: Path) -> None:
    config = load(Config, path, ["steps=3", "model.num_experts=8"])
    plain = to_dict(config)
    assert plain["model"]["num_experts"] == 8
    assert "name" in plain
    assert build(Config, plain) == config
    assert "steps" not in to_dict(load(Config, path))


def test_a_digest_names_the_data_whatever_its_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert len(digest({})) == 12


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.num_layers=1", "unknown config key modle; did you mean model?"),
        ("model.num_layer=1", "unknown config key model.num_layer; did you mean model.num_layers?"),
        ("xyzzy=1", "unknown config key xyzzy; known keys: columns, data, kind, model, name"),
        ("steps", "override 'steps' is not of the form key=value, for example parallel.ep=2"),
        ("=3", "override '=3' is not of the form key=value"),
        ("a b=3", "override 'a b=3' cannot be read: "),
        ("model=3", "model is a table of keys, found 3; write model.NAME=VALUE"),
        ("kind=huge", "kind='huge' is not known; use one of 'small', 'large'"),
        ("steps=many", "steps must be a whole number, found 'many'"),
        ("steps=1.5", "steps must be a whole number, found 1.5"),
        ("steps=true", "steps must be a whole number, found True"),
        ("model.dropout=x", "model.dropout must be a number, found 'x'"),
        ("model.dropout=true", "model.dropout must be a number, found True"),
        ("name=3", "name must be a string, found 3"),
        ("resume=1", "resume must be true or false, found 1"),
        ("output=3", "output must be a path, found 3"),
        ("data=3", "data must be a path or a URI, found 3"),
        (
            "data=file://x/y",
            "data=file://x/y must have three slashes and an absolute path, as file",
        ),
        ("output=file://", "output=file:// must have three slashes and an absolute path, as file"),
        (
            "data=s3://me:secret@b/x",
            "data holds a password, which would be logged and stored; leave",
        ),
        (
            "model.num_experts=x",
            "model.num_experts must be a whole number or a list (a whole number each), found 'x'",
        ),
        ("columns.text=3", "columns.text must be a string, found 3"),
        ("model.num_layers=0", "model.num_layers=0 must be at least 1"),
    ],
)
def test_a_bad_override_is_named(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(Config, path, [override])
    assert message in str(raised.value)


def test_a_missing_key_is_named() -> None:
    message = r"key model\.num_layers is missing; add it to the file or as model\.num_layers=VALUE"
    with pytest.raises(ConfigError, match=message):
        load(Config, None, ["model.dropout=0"])


def test_a_list_names_its_bad_item() -> None:
    @dataclass(frozen=True)
    class Run:
        sizes: tuple[int, ...]

    with pytest.raises(ConfigError, match=r"sizes\[1\] must be a whole number, found 'b'"):
        build(Run, {"sizes": [1, "b"]})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    message = r"config file .*none\.toml does not exist; configs/ holds examples"
    with pytest.raises(ConfigError, match=message):
        load(Config, tmp_path / "none.toml")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder; name a \.toml file"):
        load(Config, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kind = '春'".encode("gbk"), "is not UTF-8 text"),
        (b"kind = ", "is not valid TOML: Invalid value"),
    ],
)
def test_a_file_that_is_not_toml(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(Config, path)
