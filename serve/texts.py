"""Text to tokens and back for callers, and how long texts are kept from holding up the rest."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from gptmoe.generate.params import check
from gptmoe.generate.request import MAX_CHARACTERS_A_TOKEN
from gptmoe.text import Tokenizer

T = TypeVar("T")

LONG = 2000
"""Characters, or tokens: what is longer is worked on in a thread, so that nobody waits for it."""

MAX_BYTES_A_CHARACTER = 4
"""Of UTF-8, and so tokens: what Tokenize answers, Detokenize takes."""


async def apart(size: int, call: Callable[..., T], *given: Any) -> T:
    """Make a call: in a thread if it is about so many characters or tokens that it takes time."""
    return await asyncio.to_thread(call, *given) if size > LONG else call(*given)


class Texts:
    """What callers may ask of a model's tokenizer."""

    def __init__(self, tokenizer: Tokenizer, max_seq_len: int) -> None:
        self._tokenizer = tokenizer
        self._most_characters = MAX_CHARACTERS_A_TOKEN * max_seq_len
        self._most_tokens = MAX_BYTES_A_CHARACTER * self._most_characters

    async def tokenize(self, text: str) -> tuple[tuple[int, ...], list[str]]:
        """The token ids of a text, and what each says; a part of a character is U+FFFD.

        Raises RequestError for a text that no context can hold.
        """
        wanted = f"at most {self._most_characters} characters"
        check(len(text) <= self._most_characters, "text", f"{len(text)} characters", wanted)
        return await apart(len(text), self._tokenized, text)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        """The text of token ids; raises RequestError for too many, or one the model lacks."""
        count, most = len(token_ids), self._most_tokens
        check(count <= most, "token_ids", f"{count} token ids", f"at most {most} token ids")
        return await apart(count, self._detokenized, token_ids)

    def _tokenized(self, text: str) -> tuple[tuple[int, ...], list[str]]:
        ids = tuple(self._tokenizer.encode(text))
        said = {token: self._tokenizer.decode((token,)) for token in set(ids)}
        return ids, [said[token] for token in ids]

    def _detokenized(self, token_ids: tuple[int, ...]) -> str:
        most = self._tokenizer.vocab_size - 1
        wrong = next((token for token in token_ids if not 0 <= token <= most), None)
        check(wrong is None, "token_ids", wrong, f"token ids from 0 to {most}")
        return self._tokenizer.decode(token_ids)
