"""What a prepared folder holds: `manifest.json`, and the files that it vouches for.

manifest.json       recipe, inputs, counts per split, size and sha256 of every file
{split}-tokens.bin  token ids one after the other, little-endian, uint16 or (over 65,536 ids) uint32
{split}-rows.bin    finetuning only, two int64 a row: `end`, where its tokens end in the file above,
                    and `loss_from`, how many of its first tokens bear no loss
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gptmoe.config import build, to_dict
from gptmoe.errors import ConfigError, DataError

from .reading import Kind

FORMAT_VERSION = 1
NAME = "manifest.json"
ROW_DTYPE = np.dtype("<i8")

Split = Literal["train", "validation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All choices that decide what is written; with the inputs they decide every byte."""

    kind: Kind
    tokenizer_kind: str
    tokenizer_digest: str
    columns: dict[str, str]
    sep_text: str
    validation_fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file and its checksum. `path` is absolute for an input, a name in the folder else."""

    path: str
    num_bytes: int
    sha256: str
    mtime_ns: int = 0  # inputs only: an equal time saves reading the file for its checksum

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        status = path.stat()
        return cls(
            path=str(path.resolve()),
            num_bytes=status.st_size,
            sha256=sha256(path),
            mtime_ns=status.st_mtime_ns,
        )

    def describes(self, path: Path) -> bool:
        """Whether `path` has the content that was recorded."""
        status = path.stat()
        if status.st_size != self.num_bytes:
            return False
        same = str(path.resolve()) == self.path and status.st_mtime_ns == self.mtime_ns
        return same or sha256(path) == self.sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a split holds. Tokens include <|endoftext|> and <sep>, characters do not."""

    documents: int = 0
    tokens: int = 0
    characters: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`."""

    format_version: int
    recipe: Recipe
    token_dtype: str
    has_targets: bool  # finetuning rows have a tgt_txt
    empty_rows: int  # rows left out because a text in them was blank
    splits: dict[str, Counts]
    files: tuple[FileRecord, ...]
    inputs: tuple[FileRecord, ...]
    validation_inputs: tuple[FileRecord, ...]

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read the manifest of `folder` and check the sizes of its files.

        Raises DataError if there is none, if it is damaged or of another format, or if a file is
        missing or cut.
        """
        try:
            raw = json.loads((folder / NAME).read_text(encoding="utf-8"))
            version = raw["format_version"]
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{folder} is not a prepared folder: it has no {NAME}; "
                f"make one with gptmoe data prepare"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{folder / NAME} is damaged; delete the folder and prepare again"
            ) from None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{folder} has data format {version}, this version reads {FORMAT_VERSION}; "
                "delete the folder and prepare again"
            )
        try:
            manifest = build(cls, raw)
        except ConfigError as error:
            raise DataError(
                f"{folder / NAME} is damaged ({error}); delete the folder and prepare again"
            ) from None
        manifest._check_sizes(folder)
        return manifest

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`."""
        text = json.dumps(to_dict(self), ensure_ascii=False, indent=2)
        (folder / NAME).write_text(text + "\n", encoding="utf-8")

    def tokens(self, folder: Path, split: Split) -> npt.NDArray[np.unsignedinteger]:
        """The token ids [N] of a split, mapped from disk."""
        return _map(tokens_path(folder, split), np.dtype(self.token_dtype))

    def rows(self, folder: Path, split: Split) -> npt.NDArray[np.int64]:
        """The rows [R, 2] of a finetuning split as (end, loss_from), mapped from disk."""
        return _map(rows_path(folder, split), ROW_DTYPE).reshape(-1, 2)

    def _check_sizes(self, folder: Path) -> None:
        for record in self.files:
            path = folder / record.path
            found = path.stat().st_size if path.is_file() else None
            if found != record.num_bytes:
                state = "missing" if found is None else f"{found} bytes long"
                raise DataError(
                    f"{path} should have {record.num_bytes} bytes and is {state}; "
                    "delete the folder and prepare again"
                )


def is_prepared(folder: Path) -> bool:
    """Whether `folder` was made by `prepare`."""
    return (folder / NAME).is_file()


def verify(folder: Path) -> Manifest:
    """Read every file of a prepared folder and compare checksums; DataError names a file that
    differs.
    """
    manifest = Manifest.load(folder)
    for record in manifest.files:
        if sha256(folder / record.path) != record.sha256:
            raise DataError(
                f"{folder / record.path} is corrupt (its checksum differs); "
                "delete the folder and prepare again"
            )
    return manifest


def sha256(path: Path) -> str:
    """The checksum of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokens_path(folder: Path, split: Split) -> Path:
    """Where the token ids of a split lie."""
    return folder / f"{split}-tokens.bin"


def rows_path(folder: Path, split: Split) -> Path:
    """Where the rows of a finetuning split lie."""
    return folder / f"{split}-rows.bin"


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # which no system can map
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")
