"""Writing the files of a prepared folder, and deciding which split a document goes to."""

import hashlib
import os
from pathlib import Path

import numpy as np

from .encode import Document
from .manifest import ROW_DTYPE, Counts, FileRecord, Split, rows_path, tokens_path
from .reading import Kind


class SplitWriter:
    """Appends documents to the files of one split, taking counts and checksums on the way."""

    def __init__(self, folder: Path, split: Split, kind: Kind) -> None:
        self._tokens = _HashedFile(tokens_path(folder, split))
        self._rows = _HashedFile(rows_path(folder, split)) if kind == "finetune" else None
        self._documents = self._num_tokens = self._characters = 0

    @property
    def counts(self) -> Counts:
        """What has been written so far."""
        return Counts(
            documents=self._documents, tokens=self._num_tokens, characters=self._characters
        )

    def add(self, document: Document) -> None:
        """Append a document."""
        self._tokens.write(document.tokens)
        self._documents += 1
        self._num_tokens += document.num_tokens
        self._characters += document.characters
        if self._rows:
            self._rows.write(np.array([self._num_tokens, document.loss_from], ROW_DTYPE).tobytes())

    def finish(self) -> list[FileRecord]:
        """Bring all to the disk; the records for the manifest."""
        return [file.finish() for file in (self._tokens, self._rows) if file]

    def close(self) -> None:
        """Close the files."""
        for file in (self._tokens, self._rows):
            if file:
                file.close()


class Divider:
    """Sends each document to train or validation by its digest, so that equal ones stay together.

    About `fraction` of the distinct documents go to validation; if that would be none, the one with
    the smallest digest does (it is held back until the end, in one copy however often it comes),
    unless it is all there is.
    """

    def __init__(self, train: SplitWriter, validation: SplitWriter, fraction: float) -> None:
        self._train = train
        self._validation = validation
        self._fraction = fraction
        self._held: Document | None = None
        self._copies = 0

    def add(self, document: Document) -> None:
        """Write the document, or hold it back."""
        if self._fraction == 0:
            self._train.add(document)
        elif int.from_bytes(document.digest[:8], "big") < self._fraction * 2**64:
            self._validation.add(document)
        elif self._held is None or document.digest < self._held.digest:
            self._release(self._train)
            self._held, self._copies = document, 1
        elif document.digest == self._held.digest:
            self._copies += 1
        else:
            self._train.add(document)

    def finish(self) -> None:
        """Write what was held back."""
        lacking = self._train.counts.documents and not self._validation.counts.documents
        self._release(self._validation if lacking else self._train)

    def _release(self, writer: SplitWriter) -> None:
        if self._held is not None:
            for _ in range(self._copies):
                writer.add(self._held)
        self._held = None


class _HashedFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    def finish(self) -> FileRecord:
        self._file.flush()
        os.fsync(self._file.fileno())  # the rename that follows must not overtake the bytes
        return FileRecord(
            path=self._path.name, num_bytes=self._file.tell(), sha256=self._hash.hexdigest()
        )

    def close(self) -> None:
        self._file.close()
