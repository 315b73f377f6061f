"""Inputs that lie on another file system: looked at where they are, fetched once to be read here.

    if isinstance(location, Uri):
        location = fetch(location, run_dir / "inputs")  # run_dir/inputs/poems.tsv-0a1b.../poems.tsv

A URI is one that `pyarrow.fs.FileSystem.from_uri` knows, such as s3://, gs:// or hdfs://, and
names a file or a folder. Credentials come from the machine's own configuration.
"""

import contextlib
import fcntl
import importlib
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gptmoe.config import Uri, digest
from gptmoe.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What lies at a URI."""

    uri: Uri
    filesystem: Any
    path: str
    """What the file system itself calls it."""
    is_folder: bool
    files: Mapping[str, tuple[int, int]]
    """(bytes, time of change in ns) by name within the folder; of a file alone, by its name."""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name or "all"

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(size for size, _ in self.files.values())


def check(uri: Uri) -> None:
    """Raise DataError if nothing is at `uri`, or its file system cannot be reached."""
    _open(uri)


def look(uri: Uri) -> Found:
    """All files at `uri`. Raises DataError as `check` does, if it is a folder without files, and if
    a name would lead out of the folder that it is copied to.
    """
    filesystem, top = _open(uri)
    is_folder = top.type == _files().FileType.Directory
    infos = [top]
    if is_folder:
        with _in_words(uri):
            infos = filesystem.get_file_info(_files().FileSelector(top.path, recursive=True))
    folder = top.path if is_folder else PurePosixPath(top.path).parent
    files = {
        str(PurePosixPath(info.path).relative_to(folder)): (info.size, info.mtime_ns or 0)
        for info in infos
        if info.type == _files().FileType.File
    }
    if not files:
        raise DataError(f"{uri} holds no file; name a file, or a folder with files")
    found = Found(uri=uri, filesystem=filesystem, path=top.path, is_folder=is_folder, files=files)
    for name in (found.name, *files):  # to an object store `..` is a name like any other
        if ".." in PurePosixPath(name).parts:
            raise DataError(f"{uri} holds {name}, and a name may not have `..` in it; rename it")
    return found


def fetch(uri: Uri, folder: Path) -> Path:
    """Copy what is at `uri` below `folder`, whole or not at all, and return its path there.

    Done once: a copy of the same files (names, sizes, times) is found again, also by another
    process; changed files are fetched anew beside it. Raises DataError as `look` does, or if the
    copy fails.
    """
    found = look(uri)
    listed = {name: list(facts) for name, facts in found.files.items()}
    target = folder / f"{found.name}-{digest({'uri': uri, 'files': listed})}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if not target.is_dir():
                _copy(found, target)
    except (OSError, _arrow().ArrowException) as error:
        raise DataError(
            f"{uri} cannot be fetched to {folder}: {_reason(error)}; start again to try again"
        ) from None
    return target / found.name


def _copy(found: Found, target: Path) -> None:
    part = target.with_name(target.name + ".tmp")
    if part.exists():  # left by a process that was killed
        shutil.rmtree(part)
    part.mkdir()
    log.info("fetching %s: %d files, %.1f MB", found.uri, len(found.files), found.num_bytes / 1e6)
    started_s = time.monotonic()
    try:
        top = part / found.name if found.is_folder else part
        for name in found.files:  # an object store may have names with slashes, but no folders
            (top / name).parent.mkdir(parents=True, exist_ok=True)
        _files().copy_files(
            found.path,
            str(part / found.name),
            source_filesystem=found.filesystem,
            destination_filesystem=_files().LocalFileSystem(),
        )
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    log.info("fetched %s to %s in %.1f s", found.uri, target, time.monotonic() - started_s)


def _open(uri: Uri) -> tuple[Any, Any]:
    """The file system, and what it says about the path."""
    with _in_words(uri):
        filesystem, path = _files().FileSystem.from_uri(uri)
        info = filesystem.get_file_info(path.rstrip("/") or path)
    if info.type == _files().FileType.NotFound:
        raise DataError(f"{uri} does not exist; check the address")
    return filesystem, info


@contextlib.contextmanager
def _in_words(uri: Uri) -> Iterator[None]:
    try:
        yield
    except (OSError, _arrow().ArrowException) as error:
        raise DataError(
            f"{uri} cannot be reached: {_reason(error)}; check the address, and this machine's "
            "network and credentials"
        ) from None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time: replicas of a node that start together fetch a checkpoint once."""
    with (folder / ".lock").open("a") as file:
        with contextlib.suppress(OSError):  # without locks: a run's folder has one process anyway
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reason(error: BaseException) -> str:
    """The first line, without the stop that would end our sentence."""
    return str(error).partition("\n")[0].rstrip(". ") or type(error).__name__


def _arrow() -> Any:
    """pyarrow, from the first URI on: each process that meets none saves 10 MB."""
    return importlib.import_module("pyarrow")


def _files() -> Any:
    return importlib.import_module("pyarrow.fs")
