"""A tokenizer for tests of what stands around a model."""

from collections.abc import Sequence
from pathlib import Path


class Characters:
    """A tokenizer of one token a character."""

    kind, vocab_size, end_id, sep_id, digest = "characters", 0x110000, 0, 1, "0" * 12

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        return "".join(map(chr, token_ids))

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def characters_per_token(self) -> list[int]:
        return [1] * self.vocab_size

    def save(self, folder: Path) -> None:
        raise NotImplementedError
