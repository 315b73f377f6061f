"""manifest.json: which files a checkpoint has, and in which of them each box of each tensor lies.

While a checkpoint is being written, each rank describes its own part in this same form; `merge`
proves that the parts together hold every tensor exactly once.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptmoe.config import digest
from gptmoe.errors import CheckpointError

from .boxes import Box, gaps, overlap

MANIFEST = "manifest.json"
CONFIG = "config.json"
VERSION = 1
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The safetensors codes of the types that a checkpoint may hold."""
ADVICE = "use an older checkpoint or copy it again"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one box of a tensor lies."""

    file: str
    box: Box


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A logical tensor: a code of DTYPES, its full shape and its pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Stored, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Files by name, tensors by group and name, and how far training had come."""

    files: Mapping[str, FileRecord]
    groups: Mapping[str, Mapping[str, TensorRecord]]
    progress: Mapping[str, Any] = field(default_factory=dict)


def key(name: str, shape: tuple[int, ...], box: Box) -> str:
    """The name of a piece in its safetensors file: a complete tensor keeps its own."""
    return name if box.shape == shape else f"{name}{box}"


def merge(parts: Iterable[Manifest]) -> Manifest:
    """One manifest of all parts; CheckpointError unless every tensor is there exactly once."""
    files: dict[str, FileRecord] = {}
    groups: dict[str, dict[str, TensorRecord]] = {}
    for part in parts:
        files.update(part.files)
        for group, tensors in part.groups.items():
            merged = groups.setdefault(group, {})
            for name, record in tensors.items():
                merged[name] = join(name, merged[name], record) if name in merged else record
    for tensors in groups.values():
        for name, record in tensors.items():
            check_cover(name, record)
    return Manifest(files, groups)


def join(name: str, one: TensorRecord, other: TensorRecord) -> TensorRecord:
    """The pieces of both; CheckpointError if they are of different tensors."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        raise CheckpointError(
            f"pieces of {name} disagree: {one.dtype} {list(one.shape)} and "
            f"{other.dtype} {list(other.shape)}; all ranks must save the same tensor"
        )
    return TensorRecord(one.dtype, one.shape, one.pieces + other.pieces)


def check_cover(name: str, record: TensorRecord) -> None:
    """Raise CheckpointError unless the pieces cover the tensor exactly once."""
    outer, boxes = Box.whole(record.shape), [piece.box for piece in record.pieces]
    if missing := gaps(outer, boxes):
        raise CheckpointError(
            f"{name} {list(record.shape)} is incomplete: no rank handed in {missing[0]}"
        )
    if sum(box.volume for box in boxes) > outer.volume:
        raise CheckpointError(
            f"{name} {list(record.shape)} is there twice: two pieces hold {overlap(boxes)}; "
            f"only one of several replicas hands in its piece"
        )


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest, or one rank's part, with a digest of itself."""
    plain = json.loads(json.dumps(_to_plain(manifest)))  # as it will be read: the digest must agree
    text = json.dumps({"digest": digest(plain), **plain}, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_manifest(path: Path) -> Manifest:
    """Read what `write_manifest` wrote; CheckpointError if missing, corrupt or too new."""
    folder = path.parent
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        intact = plain.pop("digest") == digest(plain)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: it has no {path.name}; {ADVICE}"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path.name} in {folder} cannot be read: {error.strerror}; {ADVICE}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise CheckpointError(
            f"{path.name} in {folder} is corrupt: its digest does not match; {ADVICE}"
        )
    if plain["version"] > VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {plain['version']}, "
            f"this gptmoe reads up to {VERSION}; update gptmoe"
        )
    return _from_plain(plain)


def _to_plain(manifest: Manifest) -> dict[str, Any]:
    def piece(stored: Stored) -> dict[str, Any]:
        return {"file": stored.file, "start": stored.box.start, "shape": stored.box.shape}

    def tensor(record: TensorRecord) -> dict[str, Any]:
        return {
            "dtype": record.dtype,
            "shape": record.shape,
            "pieces": [piece(p) for p in record.pieces],
        }

    return {
        "version": VERSION,
        "progress": manifest.progress,
        "files": {
            name: {"size_bytes": f.size_bytes, "sha256": f.sha256}
            for name, f in manifest.files.items()
        },
        "groups": {
            group: {name: tensor(record) for name, record in tensors.items()}
            for group, tensors in manifest.groups.items()
        },
    }


def _from_plain(plain: Mapping[str, Any]) -> Manifest:
    def piece(raw: Mapping[str, Any]) -> Stored:
        return Stored(raw["file"], Box(tuple(raw["start"]), tuple(raw["shape"])))

    def tensor(raw: Mapping[str, Any]) -> TensorRecord:
        return TensorRecord(raw["dtype"], tuple(raw["shape"]), tuple(map(piece, raw["pieces"])))

    groups = {
        group: {name: tensor(raw) for name, raw in tensors.items()}
        for group, tensors in plain["groups"].items()
    }
    return Manifest(
        {name: FileRecord(**raw) for name, raw in plain["files"].items()}, groups, plain["progress"]
    )
