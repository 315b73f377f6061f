"""Files of a checkpoint: hashed while they are written, on the disk before they count, checked."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from gptmoe.errors import CheckpointError

from .manifest import ADVICE, DTYPES, FileRecord

CHUNK_BYTES = 1 << 20
ALIGNMENT_BYTES = 64
CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write a safetensors file (8 bytes of length, a JSON header, the values) in one pass.

    The library's own writer would need a second pass for the checksum, which halves the bandwidth,
    and its error for a full disk is not an OSError.
    """
    # The widest type first: then every tensor begins at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    sha256 = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in (len(text).to_bytes(8, "little"), text):
            sha256.update(chunk)
            file.write(chunk)
        for _, tensor in ordered:
            for view in _chunks(tensor):
                sha256.update(view)
                file.write(view)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(8 + len(text) + end, sha256.hexdigest())


def seal(path: Path) -> FileRecord:
    """Flush a file that somebody else wrote to the disk and describe it."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return FileRecord(file.tell(), sha256)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the file system can promise that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def check(path: Path, record: FileRecord, checksum: bool) -> None:
    """Raise CheckpointError, naming the file, unless it is there and as recorded."""
    where = f"{path.name} in {path.parent}"
    try:
        size_bytes = path.stat().st_size
        if size_bytes != record.size_bytes:
            raise CheckpointError(
                f"{where} is damaged: it has {size_bytes} of {record.size_bytes} bytes; {ADVICE}"
            )
        if checksum:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 != record.sha256:
                raise CheckpointError(f"{where} is corrupt: its checksum does not match; {ADVICE}")
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing from {path.parent}; {ADVICE}") from None
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {reason(error)}; {ADVICE}") from None


def reason(error: Exception) -> str:
    """An error for people: "No space left on device", not "[Errno 28] No space ..."."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    values = flat.view(torch.uint8).numpy().data  # bfloat16 too, which numpy does not know
    for first in range(0, len(values), CHUNK_BYTES):
        yield values[first : first + CHUNK_BYTES]
