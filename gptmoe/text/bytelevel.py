"""What the tokenizers share: byte-pair encoding whose alphabet is the 256 bytes.

In files a byte is one printable character (GPT-2's table): bytes that print as themselves stand for
themselves, the others for the characters from U+0100 on.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from gptmoe import config
from gptmoe.errors import DataError

from .protocol import END

Merges = Sequence[tuple[str, str]]


def _byte_of_character() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


class ByteLevelTokenizer(ABC):
    """A `Tokenizer` (see there); subclasses say how a text is cut before its bytes are merged."""

    kind: ClassVar[str]
    special: ClassVar[tuple[str, ...]]
    """Tokens that steer the model; a text reaches them only with `allow_special`."""
    literal: ClassVar[tuple[str, ...]] = ()
    """Tokens that stand in the vocabulary as the text they are, and take part in no merge."""
    pattern: ClassVar[bool]
    """Whether the merging cuts its input by GPT-2's pattern first."""
    separator: ClassVar[str]

    def __init__(self, vocab: Mapping[str, int], merges: Merges) -> None:
        """`vocab` and `merges` as `check_vocabulary` wants them."""
        self._vocab = dict(vocab)
        self._merges = list(merges)
        self._bpe = self._build()
        self._bytes = [self._bytes_of(token) for token in sorted(vocab, key=vocab.__getitem__)]
        self._special_ids = {token: self._vocab[token] for token in self.special}
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, self.special))})")

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @property
    def end_id(self) -> int:
        return self._vocab[END]

    @property
    def sep_id(self) -> int:
        return self._vocab[self.separator]

    @cached_property
    def digest(self) -> str:
        plain = {"vocab": self._vocab, "merges": self._merges}
        return config.digest({"kind": self.kind, "rules": self._rules(), **plain})

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        check_unicode(text)
        if not allow_special:
            return self._encode_plain(text)
        ids: list[int] = []
        for piece in self._special_pattern.split(text):
            special_id = self._special_ids.get(piece)
            ids += self._encode_plain(piece) if special_id is None else [special_id]
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        skipped = set(self._special_ids.values()) if skip_special else set()
        pieces = [self.token_bytes(token_id) for token_id in token_ids if token_id not in skipped]
        return b"".join(pieces).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < len(self._bytes):
            raise DataError(
                f"token id {token_id} is outside the vocabulary of {len(self._bytes)} tokens;"
                " use the tokenizer that made the ids"
            )
        return self._bytes[token_id]

    def characters_per_token(self) -> list[int]:
        counts = [sum(byte & 0xC0 != 0x80 for byte in token) for token in self._bytes]
        for token_id in self._special_ids.values():
            counts[token_id] = 0
        return counts

    @classmethod
    def named(cls) -> tuple[str, ...]:
        """The tokens that stand for the text they are, not for bytes in GPT-2's table."""
        return cls.special + cls.literal

    def to_json(self) -> str:
        """As Hugging Face's `tokenizer.json`."""
        return self._bpe.to_str(pretty=True)

    @abstractmethod
    def save(self, folder: Path) -> None: ...

    @abstractmethod
    def _encode_plain(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is special."""

    def _rules(self) -> str:
        """What besides the vocabulary decides the ids; part of the digest."""
        return ""

    def _build(self) -> tokenizers.Tokenizer:
        bpe = tokenizers.Tokenizer(models.BPE(self._vocab, self._merges))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern)
        bpe.decoder = decoders.ByteLevel()
        bpe.add_special_tokens(list(self.special))
        bpe.add_tokens([AddedToken(token, normalized=False) for token in self.literal])
        bpe.encode_special_tokens = True  # `encode` finds the special tokens; here they are text
        return bpe

    def _bytes_of(self, token: str) -> bytes:
        if token in self.named():
            return token.encode()
        return bytes(BYTE_OF_CHARACTER[character] for character in token)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._vocab, self._merges)


def check_vocabulary(
    source: Path, vocab: Mapping[str, int], merges: Merges, named: Sequence[str]
) -> None:
    """Raise DataError, naming the file `source`, unless a `ByteLevelTokenizer` can be built.

    `named` are the tokens that stand for themselves. Ids must be 0 to V - 1, all 256 bytes must be
    there, and every merge must join two known tokens to a known one.
    """
    size = len(vocab)
    absent_bytes = [byte for character, byte in BYTE_OF_CHARACTER.items() if character not in vocab]
    remedy = "take the files of a byte-level tokenizer, or train one: gptmoe tokenizer train"
    if missing := [token for token in named if token not in vocab]:
        raise DataError(f"{source} lacks the token {', '.join(map(repr, missing))}; {remedy}")
    if {*map(type, vocab.values())} != {int} or {*vocab.values()} != {*range(size)}:
        raise DataError(f"{source} must number its {size} tokens from 0 without gaps; {remedy}")
    if absent_bytes:
        raise DataError(
            f"{source} must hold all 256 bytes as tokens, lacks {len(absent_bytes)}"
            f" (first {min(absent_bytes):#04x}); {remedy}"
        )
    for token in vocab.keys() - set(named):
        if not token or not BYTE_OF_CHARACTER.keys() >= set(token):
            raise DataError(f"{source} holds {token!r}, which does not stand for bytes; {remedy}")
    for left, right in merges:
        if not {left, right, left + right} <= vocab.keys():
            raise DataError(f"{source} merges {left!r} {right!r} to no token of its own; {remedy}")


def write_file(path: Path, text: str) -> None:
    """Write UTF-8 text; the name appears when the file is complete. Raises DataError."""
    partial = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}; choose another folder") from None


def check_unicode(text: str) -> None:
    """Raise DataError for a string that UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(
            f"character {error.start} of the text is U+{code:04X}, a lone surrogate, which no"
            " Unicode text holds; read the input as UTF-8"
        ) from None
