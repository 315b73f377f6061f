"""Examples to token ids."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gptmoe.text import Tokenizer

from .reading import Example, Kind


class Document(NamedTuple):
    """An encoded example."""

    tokens: bytes  # of Encoder.dtype
    num_tokens: int
    loss_from: int  # the first tokens that bear no loss; 0 in pretraining
    characters: int
    digest: bytes  # of the content, whatever the tokenizer: equal examples have equal digests
    file: int
    done: float


@dataclass(frozen=True, slots=True)
class Encoder:
    """Encodes examples: text + <|endoftext|>, or src + <sep>, or src + tgt + <sep>.

    With `sep_text` every occurrence of it in src_txt becomes the <sep> token.
    """

    tokenizer: Tokenizer
    kind: Kind
    sep_text: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest of uint16 and uint32 that holds every id, little-endian."""
        return np.dtype("<u2" if self.tokenizer.vocab_size <= 2**16 else "<u4")

    def __call__(self, examples: Sequence[Example]) -> list[Document]:
        return [self._encode(example) for example in examples]

    def _encode(self, example: Example) -> Document:
        token_ids = self._source(example.text)
        loss_from = 0
        if example.target is not None:
            loss_from = len(token_ids)
            token_ids += self.tokenizer.encode(example.target)
        token_ids.append(
            self.tokenizer.end_id if self.kind == "pretrain" else self.tokenizer.sep_id
        )
        return Document(
            tokens=np.array(token_ids, self.dtype).tobytes(),
            num_tokens=len(token_ids),
            loss_from=loss_from,
            characters=len(example.text) + len(example.target or ""),
            digest=_digest(example),
            file=example.file,
            done=example.done,
        )

    def _source(self, text: str) -> list[int]:
        if not self.sep_text:
            return self.tokenizer.encode(text)
        first, *others = text.split(self.sep_text)
        token_ids = self.tokenizer.encode(first)
        for part in others:
            token_ids += [self.tokenizer.sep_id, *self.tokenizer.encode(part)]
        return token_ids


def _digest(example: Example) -> bytes:
    content = f"{len(example.text)}:{example.text}{example.target or ''}"
    return hashlib.blake2b(content.encode(), digest_size=16).digest()
