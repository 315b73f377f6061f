"""Writing a checkpoint: every rank its part, rank 0 the manifest and the rename that commits it.

The pieces handed in are a snapshot: nobody changes them until `save` returns. Ranks meet only in
the callable `barrier`, always three times, so that one rank's full disk leaves no other waiting.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from gptmoe.errors import CheckpointError

from .boxes import Piece
from .files import CODES, reason, seal, sync_folder, write_tensors
from .folders import unfinished
from .manifest import (
    CONFIG,
    DTYPES,
    MANIFEST,
    FileRecord,
    Manifest,
    Stored,
    TensorRecord,
    join,
    key,
    merge,
    read_manifest,
    write_manifest,
)

T = TypeVar("T")
Groups = Mapping[str, Sequence[Piece]]
"""Pieces by group: "weights"; "optimizer" with names like exp_avg/PARAMETER and step/PARAMETER."""


def save(
    folder: Path,
    *,
    rank: int,
    world: int,
    barrier: Callable[[], None],
    groups: Groups,
    config: Mapping[str, Any],
    progress: Mapping[str, Any],
    copy_files: Callable[[Path], None] | None = None,
) -> None:
    """Write the checkpoint `folder`; every rank calls it with the boxes that it alone hands in.

    `config` and `progress` are JSON data; these two and `copy_files(folder)`, which adds the
    tokenizer's files, count on rank 0. `folder` appears complete or not at all; one of the same
    name is replaced. If any rank fails, every rank raises CheckpointError, and nothing of the new
    checkpoint stays.
    """
    draft = unfinished(folder)
    failures: list[Exception] = []

    def attempt(step: Callable[[], T]) -> T | None:
        try:
            return None if failures else step()
        except Exception as error:  # noqa: BLE001 (whatever it is, this rank must reach the barriers)
            failures.append(error)
            return None

    if rank == 0:
        attempt(lambda: start(draft))
    barrier()
    part = attempt(lambda: write_part(draft, rank, world, groups))
    barrier()
    if rank == 0:
        attempt(lambda: commit(draft, folder, world, config, progress, copy_files))
        shutil.rmtree(draft, ignore_errors=True)
    barrier()
    attempt(lambda: confirm(folder, part))
    if failures:
        raise CheckpointError(
            f"checkpoint {folder} was not saved: {reason(failures[0])}; earlier ones are untouched"
        ) from failures[0]


def start(draft: Path) -> None:
    """Make the folder to write into, without what a crash left there."""
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir(parents=True)


def write_part(draft: Path, rank: int, world: int, groups: Groups) -> Manifest:
    """Write one rank's files and, for rank 0, what they hold or why they could not be written."""
    try:
        files, tensors = {}, {}
        for group, pieces in groups.items():
            name = f"{group}-{rank + 1:05d}-of-{world:05d}.safetensors"
            tensors[group] = _records(name, pieces)
            if pieces:
                values = {key(p.name, p.full_shape, p.box): p.tensor for p in pieces}
                files[name] = write_tensors(draft / name, values)
        part = Manifest(files, tensors)
        write_manifest(draft / _part_name(rank), part)
    except Exception as error:
        with suppress(OSError):
            (draft / _error_name(rank)).write_text(reason(error), encoding="utf-8")
        raise
    return part


def commit(
    draft: Path,
    folder: Path,
    world: int,
    config: Mapping[str, Any],
    progress: Mapping[str, Any],
    copy_files: Callable[[Path], None] | None,
) -> None:
    """Prove that the parts make whole tensors, add the other files and the manifest, and rename."""
    merged = merge([_take_part(draft, rank) for rank in range(world)])
    text = json.dumps(config, ensure_ascii=False, indent=1)
    (draft / CONFIG).write_text(text + "\n", encoding="utf-8")
    if copy_files:
        copy_files(draft)
    others = {path.name: path for path in sorted(draft.iterdir()) if path.name not in merged.files}
    files = {**merged.files, **{name: seal(path) for name, path in others.items()}}
    write_manifest(draft / MANIFEST, Manifest(files, merged.groups, progress))
    seal(draft / MANIFEST)
    sync_folder(draft)
    outdated = unfinished(folder.with_name(folder.name + ".old"))
    if folder.exists():
        shutil.rmtree(outdated, ignore_errors=True)
        folder.rename(outdated)
    draft.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(outdated, ignore_errors=True)


def confirm(folder: Path, part: Manifest | None) -> None:
    """Raise CheckpointError unless the committed checkpoint holds this rank's part."""
    committed: Mapping[str, FileRecord] = {}
    with suppress(CheckpointError):
        committed = read_manifest(folder / MANIFEST).files
    if not committed or (part and not part.files.items() <= committed.items()):
        raise CheckpointError("another rank failed, and rank 0 says why")


def _records(file: str, pieces: Sequence[Piece]) -> dict[str, TensorRecord]:
    records: dict[str, TensorRecord] = {}
    for piece in pieces:
        code = CODES.get(piece.tensor.dtype)
        if code is None:
            raise CheckpointError(
                f"{piece.name} is {piece.tensor.dtype}; a checkpoint holds {', '.join(DTYPES)}"
            )
        record = TensorRecord(code, piece.full_shape, (Stored(file, piece.box),))
        before = records.get(piece.name)
        records[piece.name] = join(piece.name, before, record) if before else record
    return records


def _take_part(draft: Path, rank: int) -> Manifest:
    path, error = draft / _part_name(rank), draft / _error_name(rank)
    if error.exists() or not path.exists():
        why = error.read_text(encoding="utf-8") if error.exists() else "its own message says why"
        raise CheckpointError(f"rank {rank} could not write its part: {why}")
    part = read_manifest(path)
    path.unlink()
    return part


def _part_name(rank: int) -> str:
    return f"part-{rank:05d}.json"


def _error_name(rank: int) -> str:
    return f"part-{rank:05d}.error"
