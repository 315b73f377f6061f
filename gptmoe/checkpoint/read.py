"""Reading a checkpoint: any box of any tensor, whatever layout wrote it."""

import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptmoe.errors import CheckpointError

from .boxes import Box, fits
from .files import check, reason
from .folders import latest, steps
from .manifest import (
    ADVICE,
    CONFIG,
    DTYPES,
    MANIFEST,
    Manifest,
    Stored,
    TensorRecord,
    key,
    read_manifest,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk. Holds no open file and no tensor: every read stands alone."""

    path: Path
    manifest: Manifest
    config: Mapping[str, Any]

    @property
    def progress(self) -> Mapping[str, Any]:
        """How far training had come, as given to `save`."""
        return self.manifest.progress

    def names(self, group: str = "weights") -> list[str]:
        """The logical tensors of a group; none if the checkpoint has no such group."""
        return list(self.manifest.groups.get(group, {}))

    def shape(self, name: str, group: str = "weights") -> tuple[int, ...]:
        """The full shape of a logical tensor."""
        return self._record(name, group).shape

    def dtype(self, name: str, group: str = "weights") -> torch.dtype:
        """The type in which a logical tensor was saved."""
        return DTYPES[self._record(name, group).dtype]

    def maps(self, name: str, group: str = "weights") -> bool:
        """Whether `read` gives the whole tensor as a memory map: it lies in one piece."""
        return len(self._record(name, group).pieces) == 1

    def read(self, name: str, box: Box | None = None, group: str = "weights") -> Tensor:
        """One box of a tensor (default: all of it), assembled from the pieces that hold it.

        Reads only the bytes it needs. A box that lies in one piece may come as a private memory
        map: it takes no memory until it is used, and writing into it does not reach the file.
        """
        record = self._record(name, group)
        box = box or Box.whole(record.shape)
        if not fits(box, record.shape):
            raise CheckpointError(
                f"box {box} does not lie in {name} {list(record.shape)}; ask for a part of it"
            )
        parts = [(common, piece) for piece in record.pieces if (common := piece.box.intersect(box))]
        if len(parts) == 1:
            return self._load(name, record, parts[0][1], box)
        result = torch.empty(box.shape, dtype=DTYPES[record.dtype])
        for common, piece in parts:
            result[common.slices(box)] = self._load(name, record, piece, common)
        return result

    def _record(self, name: str, group: str) -> TensorRecord:
        tensors = self.manifest.groups.get(group, {})
        if name in tensors:
            return tensors[name]
        if not tensors:
            held = ", ".join(name for name, found in self.manifest.groups.items() if found)
            raise CheckpointError(f"{self.path} holds no {group}; it holds {held or 'no tensors'}")
        near = ", ".join(get_close_matches(name, tensors)) or ", ".join(list(tensors)[:3]) + ", ..."
        raise CheckpointError(f"{self.path} has no tensor {name} in its {group}; nearest: {near}")

    def _load(self, name: str, record: TensorRecord, piece: Stored, box: Box) -> Tensor:
        try:
            with safe_open(self.path / piece.file, framework="pt") as file:
                stored = file.get_slice(key(name, record.shape, piece.box))
                part: Tensor = stored[box.slices(piece.box)]
                return part.contiguous()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{piece.file} in {self.path} cannot be read: {reason(error)}; {ADVICE}"
            ) from None


def open_checkpoint(path: Path | str, *, verify: bool = True) -> Checkpoint:
    """Open the newest checkpoint of a run's or a checkpoints folder, or `path` if it is one.

    Checks that every file is there with its size, and with `verify` its SHA-256 (about 1.5 GB/s a
    core). Raises CheckpointError with the name of the file at fault.
    """
    folder = latest(path)
    manifest = read_manifest(folder / MANIFEST)

    def check_file(name: str) -> None:
        check(folder / name, manifest.files[name], checksum=verify)

    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(check_file, manifest.files))
    return Checkpoint(folder, manifest, _read_config(folder / CONFIG))


def newest_valid(checkpoints_dir: Path) -> Checkpoint | None:
    """The newest intact checkpoint; damaged ones are named in a warning and passed over.

    None if there are no checkpoints at all; CheckpointError if all that are there are damaged. It
    reads whole files: call it on one rank and tell the others the path.
    """
    folders = steps(checkpoints_dir)
    for folder in reversed(folders):
        try:
            return open_checkpoint(folder)
        except CheckpointError as error:
            logger.warning("checkpoint %s is passed over: %s", folder, error)
    if folders:
        raise CheckpointError(
            f"all {len(folders)} checkpoints in {checkpoints_dir} are damaged; "
            f"copy one again or name a new run.dir"
        )
    return None


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(
            f"{path.name} in {path.parent} is corrupt: it is not JSON; {ADVICE}"
        ) from None
    return config
