"""TOML files to frozen dataclasses: strict, typed, with TOML dotted keys as the override language.

    config = load(TrainConfig, Path("configs/train/tiny.toml"), ["parallel.ep=2", "run.dir=runs/a"])

Each config dataclass lives next to its owner. Cross-field rules belong in the `__post_init__` of
the smallest class that sees all its fields and raise ConfigError with the key and both numbers.
"""

import dataclasses
import hashlib
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import unquote

from gptmoe.errors import ConfigError

C = TypeVar("C")

INPUT_PATH = {"input_path": True}
"""Field metadata: a relative path in a TOML file starts at that file's folder."""


class Uri(str):
    """What lies on a file system that is reached by name, such as s3://bucket/poems.tsv.

    Not a Path, which would take one of its slashes away.
    """

    __slots__ = ()


Location: TypeAlias = Path | Uri
"""The type of a field that takes a path, or a URI to be fetched (gptmoe/remote.py)."""


def load(cls: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """Read a TOML file into the frozen dataclass `cls`; later overrides win.

    `overrides` are `key.sub=value` lines. Raises ConfigError for a missing file, bad TOML, an
    unknown key (with the nearest one), a wrong type, or a value that the dataclass refuses.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        raw = _anchor_paths(cls, _read_toml(path), path.parent)
    for line in overrides:
        raw = _merge(raw, parse_override(line))
    return build(cls, raw)


def override(config: C, overrides: Sequence[str]) -> C:
    """`config` with `key.sub=value` lines applied; later ones win. Raises ConfigError as `load`."""
    raw = to_dict(config)
    for line in overrides:
        raw = _merge(raw, parse_override(line))
    return build(type(config), raw)


def parse_override(line: str) -> dict[str, Any]:
    """Parse `key.sub=value` as TOML; a value that is not TOML is taken as a string."""
    key, equals, value = line.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"override {line!r} is not of the form key=value, for example parallel.ep=2"
        )
    try:
        return tomllib.loads(line)
    except tomllib.TOMLDecodeError:
        pass
    try:
        return tomllib.loads(f"{key} = {json.dumps(value.strip(), ensure_ascii=False)}")
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"override {line!r} cannot be read: {error}") from None


def build(cls: type[C], raw: Mapping[str, Any], where: str = "") -> C:
    """Build the dataclass `cls` from plain data; `where` is the dotted prefix used in messages."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    values = {}
    for key, value in raw.items():
        if key not in fields:
            raise ConfigError(_unknown_key(where + key, list(fields), where))
        value = _by_name(value, fields[key].metadata.get("aliases", {}))
        values[key] = _convert(hints[key], value, where + key)
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise ConfigError(
                f"key {where}{name} is missing; add it to the file or as {where}{name}=VALUE"
            )
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved config as plain data (paths as strings, tuples as lists) for `build` to read."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {
                f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init
            }
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {key: value for key, value in plain(config).items() if value is not None}


def digest(plain: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that name this plain data, whatever the order of its keys."""
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist; configs/ holds examples") from None
    except IsADirectoryError:
        raise ConfigError(f"config file {path} is a folder; name a .toml file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config file {path} is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config file {path} is not valid TOML: {error}") from None


def _by_name(value: Any, aliases: Mapping[int, str]) -> Any:
    """The name of a code that a field takes for one (its metadata `aliases`); else the value."""
    return aliases.get(value, value) if type(value) is int else value


def _anchor_paths(cls: Any, raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    result = dict(raw)
    for field in dataclasses.fields(cls):
        value = raw.get(field.name)
        if field.metadata.get("input_path") and isinstance(value, str | list):
            result[field.name] = _anchored(value, folder)
        elif dataclasses.is_dataclass(hints[field.name]) and isinstance(value, dict):
            result[field.name] = _anchor_paths(hints[field.name], value, folder)
    return result


def _anchored(value: Any, folder: Path) -> Any:
    """A path, or each of a list of them, from `folder` on; URIs and other things stay."""
    if isinstance(value, list):
        return [_anchored(item, folder) for item in value]
    is_path = isinstance(value, str) and value and not _scheme(value)
    return str(folder / value) if is_path else value


def _merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merge(result[key], value) if both else value
    return result


def _unknown_key(key: str, known: Sequence[str], where: str) -> str:
    near = get_close_matches(key.removeprefix(where), known, n=1)
    hint = f"did you mean {where}{near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"unknown config key {key}; {hint}"


def _convert(hint: Any, value: Any, key: str) -> Any:
    """Check `value` against the type `hint`; lists become tuples and tables dataclasses."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is a table of keys, found {value!r}; write {key}.NAME=VALUE")
        return build(typing.cast(type, hint), value, key + ".")
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, key)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ConfigError(
            f"{key}={value!r} is not known; use one of {', '.join(map(repr, arguments))}"
        )
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {
            str(name): _convert(arguments[1], item, f"{key}.{name}") for name, item in value.items()
        }
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str | Path):
        return _path(str(value), key)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ConfigError(f"{key} must be {_type_name(hint)}, found {value!r}")


def _convert_union(arguments: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    if Uri in arguments and isinstance(value, str):
        return location(value, key)
    choices = [argument for argument in arguments if argument is not type(None)]
    for choice in choices:
        try:
            return _convert(choice, value, key)
        except ConfigError:
            if len(choices) == 1:
                raise
    wanted = " or ".join(_type_name(choice) for choice in choices)
    raise ConfigError(f"{key} must be {wanted}, found {value!r}")


def _type_name(hint: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "a string",
        bool: "true or false",
        Path: "a path",
        Uri: "a URI",
    }
    if typing.get_origin(hint) is tuple:
        return f"a list ({_type_name(typing.get_args(hint)[0])} each)"
    return names.get(hint, str(hint))


def _scheme(value: str) -> str:
    """`s3` of s3://bucket/x; empty for a path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", value)
    return found[1].lower() if found else ""


def location(value: str, key: str = "path") -> Location:
    """A path, or a URI of another file system. Raises ConfigError for one that holds a password."""
    if _scheme(value) in ("", "file"):
        return _path(value, key)
    if re.match(r"[^/]+://[^/@]*:[^/@]*@", value):
        raise ConfigError(
            f"{key} holds a password, which would be logged and stored; leave it out and let each "
            "machine's own configuration hold it"
        )
    return Uri(value)


def _path(value: str, key: str) -> Path:
    """A path, also where it is written as file:///shared/x: nothing needs to be fetched there."""
    if _scheme(value) != "file":
        return Path(value)
    host, slash, rest = value.partition("://")[2].partition("/")
    if host not in ("", "localhost") or not slash:
        raise ConfigError(
            f"{key}={value} must have three slashes and an absolute path, as file:///shared/x"
        )
    return Path("/" + unquote(rest))
