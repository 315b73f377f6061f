"""A tokenizer of bytes that a spawned process can import, and a folder prepared with it."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gptmoe.data import Manifest, prepare


@dataclass(frozen=True)
class ByteTokenizer:
    """Ids 0 to 255 are bytes; two special tokens follow."""

    vocab_size: int = 258
    end_id: int = 256
    sep_id: int = 257
    kind: str = "bytes"
    deadly: str = ""  # a text on which the process dies

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.vocab_size}".encode()).hexdigest()[:12]

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        if self.deadly and self.deadly in text:
            os._exit(3)
        return list(text.encode())

    def decode(self, token_ids: Any, *, skip_special: bool = False) -> str:
        return bytes(i for i in token_ids if i < 256).decode(errors="replace")


@pytest.fixture(scope="session", name="tokenizer")
def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def wide_tokenizer() -> ByteTokenizer:
    """One whose ids do not fit in 16 bits."""
    return ByteTokenizer(vocab_size=2**16 + 1, end_id=2**16, sep_id=2**16)


@pytest.fixture
def deadly_tokenizer() -> ByteTokenizer:
    """One that kills its process on one text."""
    return ByteTokenizer(deadly="死")


@pytest.fixture
def make(tmp_path: Path, tokenizer: ByteTokenizer) -> Callable[..., Path]:
    """Writes `text` to an input called `name` and prepares it: `make(name, text, kind=...)`."""

    def build(name: str, text: str, **options: Any) -> Path:
        source = tmp_path / name
        source.write_text(text, encoding="utf-8")
        folder = tmp_path / "prepared"
        assert isinstance(prepare([source], tokenizer, folder, **options), Manifest)
        return folder

    return build
