"""Text to tokens and back for callers, and how long texts are kept from holding up the rest."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from gptmoe.generate.params import check
from gptmoe.generate.request import MAX_CHARACTERS_A_TOKEN
from gptmoe.text import Tokenizer

T = TypeVar("T")

LONG = 2000
"""Characters, or tokens: what is longer is worked on in a thread, so that nobody waits for it."""


async def apart(size: int, call: Callable[..., T], *given: Any) -> T:
    """Make a call: in a thread if it is about so many characters or tokens that it takes time."""
    return await asyncio.to_thread(call, *given) if size > LONG else call(*given)


class Texts:
    """What callers may ask of a model's tokenizer."""

    def __init__(self, tokenizer: Tokenizer, max_seq_len: int) -> None:
        self._tokenizer = tokenizer
        self._most_characters = MAX_CHARACTERS_A_TOKEN * max_seq_len

    async def tokenize(self, text: str) -> tuple[int, ...]:
        """The token ids of a text; raises RequestError for one that no context can hold."""
        wanted = f"at most {self._most_characters} characters"
        check(len(text) <= self._most_characters, "text", f"{len(text)} characters", wanted)
        return tuple(await apart(len(text), self._tokenizer.encode, text))

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        """The text of token ids; raises RequestError for an id that the model does not have."""
        most = self._tokenizer.vocab_size - 1
        wrong = next((token for token in token_ids if not 0 <= token <= most), None)
        check(wrong is None, "token_ids", wrong, f"token ids from 0 to {most}")
        return await apart(len(token_ids), self._tokenizer.decode, token_ids)

    def each(self, token_ids: Iterable[int]) -> list[str]:
        """What each token says by itself; a part of a character is U+FFFD."""
        return [self._tokenizer.decode((token,)) for token in token_ids]
