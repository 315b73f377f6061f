"""Files of text to examples, one at a time; never a whole file in memory.

| suffix   | pretraining: one document is         | finetuning: one example is                 |
|----------|--------------------------------------|--------------------------------------------|
| .txt     | a block of lines; empty lines divide | a line                                     |
| .tsv     | the first column of a line           | the first column of a line                 |
| .jsonl   | column `text` of a line              | columns `src_txt` and, if there, `tgt_txt` |
| .parquet | column `text` of a row               | columns `src_txt` and, if there, `tgt_txt` |

All but .parquet may end in .gz too. A .tsv has no header. Text is UTF-8; only a line feed ends a
line. `columns` renames: `{"src_txt": "poem"}` reads column `poem` as `src_txt`. Lines of .txt and
.tsv have no column names and need no renaming. A .txt block longer than a million characters is
divided at a line's end.
"""

import contextlib
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from gptmoe.errors import ConfigError, DataError

Kind = Literal["pretrain", "finetune"]

SUFFIXES = (".txt", ".txt.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".parquet")
MAX_BLOCK_CHARACTERS = 1_000_000
ROWS_PER_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Example:
    """One document or finetuning example."""

    text: str  # the document, or src_txt
    target: str | None  # tgt_txt; None if the data has no such column
    file: int  # index into the files that are read
    done: float  # how much of that file has been read, 0 to 1


class _Row(NamedTuple):
    place: str  # "poems.jsonl, line 3"
    cells: Mapping[str, object]
    done: float


@dataclass(frozen=True, slots=True)
class _Names:
    """What the wanted columns are called in the files, and the config keys that rename them."""

    text: str
    text_key: str
    target: str
    target_is_required: bool

    @classmethod
    def of(cls, kind: Kind, columns: Mapping[str, str]) -> "_Names":
        known = ("text",) if kind == "pretrain" else ("src_txt", "tgt_txt")
        for key in columns:
            if key not in known:
                wanted = " and ".join(f"data.columns.{name}" for name in known)
                raise ConfigError(
                    f"data.columns.{key} is not a column of {kind} data; use {wanted}"
                )
        text, target = (columns.get(key, key) for key in (known[0], "tgt_txt"))
        return cls(text, known[0], target, "tgt_txt" in columns)


def find_files(inputs: Sequence[Path | str]) -> list[Path]:
    """Every file behind `inputs`, in the order given, those of a folder or glob sorted, each once.

    A folder is searched recursively for files with a known suffix; hidden files and `_SUCCESS`
    markers are left out. Raises DataError for a path that does not exist, holds nothing, or has an
    unknown suffix.
    """
    if not inputs:
        raise DataError("no input was given; name at least one file, folder or glob")
    files: dict[Path, None] = {}
    for path in map(Path, inputs):
        try:
            files |= dict.fromkeys(_find(path))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return list(files)


def read_examples(
    files: Iterable[Path], kind: Kind, columns: Mapping[str, str]
) -> Iterator[Example]:
    """Yield the examples of all files in order, reading as little ahead as the format allows.

    Raises DataError, naming file and line, for whatever is not UTF-8, JSON, gzip, Parquet or text,
    for a missing column, and where only some rows have `tgt_txt`; ConfigError for an unknown key in
    `columns`.
    """
    names = _Names.of(kind, columns)
    pairs: bool | None = names.target_is_required or None
    for index, file in enumerate(files):
        empty = True
        for row in _rows(file, kind, names):
            empty = False
            text = _cell(row, names.text, names.text_key)
            has_target = kind == "finetune" and names.target in row.cells
            pairs = has_target if pairs is None else pairs
            if has_target and not pairs:
                raise DataError(
                    f"{row.place} has column {names.target} and the rows before have none; "
                    "give all rows a target or none"
                )
            target = _cell(row, names.target, "tgt_txt") if pairs else None
            yield Example(text, target, index, row.done)
        if empty:
            raise DataError(f"{file} holds no text; give a file with text or leave it out")


def _find(path: Path) -> list[Path]:
    if path.is_file():
        return [_checked(path)]
    if path.is_dir():
        inside = sorted(item for item in path.rglob("*") if item.is_file() and _is_known(item))
        files = [item for item in inside if not _is_hidden(item.relative_to(path))]
        if not files:
            raise DataError(f"folder {path} holds no file ending in {', '.join(SUFFIXES)}")
        return [_checked(file) for file in files]
    if glob.has_magic(str(path)):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise DataError(f"no file matches {path}; check the pattern")
        return [file for match in matches for file in _find(Path(match))]
    raise DataError(f"{path} does not exist; check the path")


def _checked(file: Path) -> Path:
    if not _is_known(file):
        known = ", ".join(SUFFIXES)
        raise DataError(f"{file} has an unknown suffix; rename or convert it to one of {known}")
    with file.open("rb") as opened:
        if not opened.read(1):
            raise DataError(f"{file} is empty; give a file with text or leave it out")
    return file


def _is_known(file: Path) -> bool:
    return file.name.lower().endswith(SUFFIXES)


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith((".", "_")) for part in relative.parts)


def _rows(file: Path, kind: Kind, names: _Names) -> Iterator[_Row]:
    suffix = Path(file.name.lower().removesuffix(".gz")).suffix
    if suffix == ".parquet":
        return _parquet_rows(file, names)
    if suffix == ".jsonl":
        return _json_rows(file)
    lines = _lines(file)
    if suffix == ".txt" and kind == "pretrain":
        lines = _blocks(lines)
    elif suffix == ".tsv":
        lines = ((number, line.partition("\t")[0], done) for number, line, done in lines)
    return (
        _Row(f"{file}, line {number}", {names.text: line}, done)
        for number, line, done in lines
        if line.strip()
    )


Line = tuple[int, str, float]  # number from 1, text, how much of the file has been read


def _lines(file: Path) -> Iterator[Line]:
    number = 0
    try:
        with contextlib.ExitStack() as opened:
            raw = opened.enter_context(file.open("rb"))
            size = file.stat().st_size
            lines = cast(BinaryIO, raw)
            if file.name.lower().endswith(".gz"):
                unzipped = opened.enter_context(gzip.GzipFile(fileobj=raw))
                lines = cast(BinaryIO, io.BufferedReader(unzipped))
            for line in lines:
                number += 1
                text = _decode(line.removesuffix(b"\n").removesuffix(b"\r"), file, number)
                yield number, text, raw.tell() / size
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{file} is not a sound gzip file (after line {number}: {error}); "
            "copy or compress it again"
        ) from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None


def _decode(line: bytes, file: Path, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x}"
        raise DataError(
            f"{file}, line {number} is not UTF-8 ({found}); convert the file, for example: "
            "iconv -f gb18030 -t utf-8"
        ) from None


def _blocks(lines: Iterator[Line]) -> Iterator[Line]:
    """Join neighbouring lines; the number is the first line's."""
    block: list[str] = []
    first, characters, done = 0, 0, 0.0
    for number, line, done in lines:
        if line.strip():
            first = first if block else number
            block.append(line)
            characters += len(line) + 1
        if block and (not line.strip() or characters > MAX_BLOCK_CHARACTERS):
            yield first, "\n".join(block), done
            block, characters = [], 0
    if block:
        yield first, "\n".join(block), done


def _json_rows(file: Path) -> Iterator[_Row]:
    for number, line, done in _lines(file):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{place} is not JSON ({error}); write one JSON object a line"
            ) from None
        if not isinstance(cells, dict):
            raise DataError(
                f"{place} is not a JSON object but {_short(cells)}; write one object a line"
            )
        yield _Row(place, cells, done)


def _parquet_rows(file: Path, names: _Names) -> Iterator[_Row]:
    number = 0
    try:
        with pq.ParquetFile(file) as parquet:
            total = parquet.metadata.num_rows
            found = parquet.schema_arrow.names
            if names.text not in found:
                raise _missing(str(file), names.text, names.text_key, found)
            wanted = [name for name in (names.text, names.target) if name in found]
            for batch in parquet.iter_batches(ROWS_PER_BATCH, columns=wanted):
                for cells in batch.to_pylist():
                    number += 1
                    yield _Row(f"{file}, row {number}", cells, number / total)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{file} is not a sound Parquet file (after row {number}: {reason}); "
            "copy or write it again"
        ) from None


def _cell(row: _Row, name: str, key: str) -> str:
    if name not in row.cells:
        raise _missing(row.place, name, key, row.cells)
    value = row.cells[name]
    if not isinstance(value, str):
        raise DataError(f"{row.place}: column {name} must be text, found {_short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.place}: column {name} holds half a surrogate pair "
            f"({value[error.start]!r}); write the whole character"
        ) from None
    return value


def _missing(place: str, name: str, key: str, found: Iterable[str]) -> DataError:
    return DataError(
        f"{place} has no column {name}, found {', '.join(found) or 'none'}; "
        f"if another name holds it, set data.columns.{key}=NAME"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:40] + "..."
