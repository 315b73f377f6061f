"""Prompts to answers: by a checkpoint in this process (a server: `remote.py`), and as JSON files.

A file of prompts is `[{"id": ..., "txt": "..."}]`, where an item may have `"max_new_tokens": 32` of
its own; its answers are `[{"id": ..., "prompt": "...", "output_TASK": "..."}]`, where the output
repeats the prompt.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from gptmoe.errors import DataError, GptMoeError
from gptmoe.generate.params import SamplingParams, is_unicode

_KEYS = ("id", "txt", "max_new_tokens")


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt of a file."""

    id: Any
    txt: str
    max_new_tokens: int = 0
    """Of its answer; 0: as many as the others."""

    def sampling(self, common: SamplingParams) -> SamplingParams:
        """What is common to all prompts, with what is its own."""
        return replace(common, max_new_tokens=self.max_new_tokens or common.max_new_tokens)


Answer = str | GptMoeError
"""The text behind a prompt, or why there is none."""


class Answerer(Protocol):
    """Continues prompts; texts come without their prompt."""

    def generate(self, items: Sequence[Item]) -> Iterator[tuple[int, Answer]]:
        """Continue each prompt: its index and answer, as each is done."""

    def stream(self, prompt: str) -> Iterator[str]:
        """Continue one prompt, piece by piece."""


class Local:
    """A loaded checkpoint in this process."""

    def __init__(self, model: Any, sampling: SamplingParams) -> None:
        self._model, self._sampling = model, sampling

    def generate(self, items: Sequence[Item]) -> Iterator[tuple[int, Answer]]:
        """Continue all prompts in one engine: its index and text, as each is done.

        Raises RequestError at once if one of them is refused.
        """
        sampling = [item.sampling(self._sampling) for item in items]
        return iter(self._model.generate_each([item.txt for item in items], sampling))

    def stream(self, prompt: str) -> Iterator[str]:
        """Continue one prompt, piece by piece."""
        return iter(self._model.stream(prompt, **asdict(self._sampling)))


def read(path: Path) -> list[Item]:
    """The prompts of a JSON file. Raises DataError naming the file and the item."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON in UTF-8: {error}") from None
    if not isinstance(raw, list) or not raw:
        raise DataError(f'{path} must hold a list of prompts, as [{{"id": 1, "txt": "春风"}}]')
    return [_item(path, number, item) for number, item in enumerate(raw, start=1)]


def answers(items: Sequence[Item], found: Sequence[Answer], task: str) -> list[dict[str, Any]]:
    """The rows of an answer file; of a prompt without a text, "error" says why."""
    rows = []
    for item, answer in zip(items, found, strict=True):
        said = (
            {f"output_{task}": item.txt + answer}
            if isinstance(answer, str)
            else {"error": str(answer)}
        )
        rows.append({"id": item.id, "prompt": item.txt, **said})
    return rows


def check_writable(path: Path) -> None:
    """Raise DataError where `write` could not: before hours of work, not behind them."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DataError(f"{path} cannot be written; name a file in a folder that is there")


def write(rows: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    """Write rows as JSON, in one rename; to stdout without a path."""
    text = json.dumps(rows, ensure_ascii=False, indent=2) + "\n"
    if path is None:
        sys.stdout.write(text)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written: {error.strerror}") from None


def _item(path: Path, number: int, item: Any) -> Item:
    if not isinstance(item, dict) or not {"id", "txt"} <= item.keys():
        raise DataError(f'{path}, item {number} must be an object with "id" and "txt"')
    if not isinstance(item["txt"], str) or not item["txt"] or not is_unicode(item["txt"]):
        raise DataError(f'{path}, item {number}: "txt" must be a text of at least one character')
    most = item.get("max_new_tokens", 0)
    if "max_new_tokens" in item and (type(most) is not int or most < 1):
        raise DataError(
            f'{path}, item {number}: "max_new_tokens" must be a whole number of at least 1; found '
            f"{most!r}; leave it out for that of all"
        )
    unknown = sorted(item.keys() - _KEYS)
    if unknown:
        raise DataError(
            f"{path}, item {number}: {unknown[0]!r} is not known; an item has {', '.join(_KEYS)}"
        )
    return Item(item["id"], item["txt"], most)
