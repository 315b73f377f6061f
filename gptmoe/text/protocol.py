"""What every tokenizer can do. The rest of the package knows only this."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

END = "<|endoftext|>"
"""Ends a document or an answer."""

SEP = "<sep>"
"""Stands between a prompt and its answer."""


class Tokenizer(Protocol):
    """Text to token ids and back, without loss. Deterministic, picklable, shared by threads."""

    @property
    def kind(self) -> str:
        """`jiebabpe` or `gpt2bpe`."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 to vocab_size - 1."""

    @property
    def end_id(self) -> int:
        """Id of `<|endoftext|>`."""

    @property
    def sep_id(self) -> int:
        """Id of `<sep>`; of `<|endoftext|>` where the vocabulary has no separator."""

    @property
    def digest(self) -> str:
        """12 hexadecimal digits: equal if and only if the same text gets the same ids."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of `text`. Special tokens written in it are plain text unless `allow_special`.

        Raises DataError for a text that is not Unicode (a lone surrogate).
        """

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of the joined token bytes; bytes that are not UTF-8 become U+FFFD.

        Raises DataError for an id outside the vocabulary.
        """

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for (a special token: its name). Raises DataError as `decode`."""

    def characters_per_token(self) -> list[int]:
        """How many characters start in each token, by id; 0 for special tokens.

        The sum over a text's ids is the number of its characters, so a loss per token can be turned
        into bits per character.
        """

    def save(self, folder: Path) -> None:
        """Write the files that `load_tokenizer(folder)` reads. Raises DataError if it cannot."""
