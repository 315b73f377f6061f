"""Log-probabilities in OpenAI's two shapes; how a token is written that is no whole character."""

import math
from collections.abc import Sequence

from gptmoe.generate.delta import Delta, TokenScore, TopLogprobs
from gptmoe.text import StreamDecoder, Tokenizer

from .answers import ChatLogprobs, ChatToken, TextLogprobs, TopToken

LEAST = -9999.0
"""What stands for a probability of 0: JSON has no infinity."""


def written(data: bytes) -> str:
    """A token's bytes as text; as OpenAI writes them where they are no whole characters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _told(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST


class TextScores:
    """Writes down the log-probabilities of one text, as its tokens come.

    `text_offset` counts the characters before a token: whole ones, and those that stay unfinished.
    """

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._top = top
        self._characters = 0

    def of_delta(self, delta: Delta) -> TextLogprobs:
        """Of the tokens of an answer; the chosen one is always among the likeliest."""
        return self._of(delta.token_ids, delta.logprobs, delta.top_logprobs)

    def of_prompt(self, token_ids: Sequence[int], scores: Sequence[TokenScore]) -> TextLogprobs:
        """Of a prompt's tokens, of which the first has none; of those that were not scored, since
        the request was ended before, nothing is said."""
        logprobs = (None, *(score.logprob for score in scores))
        likeliest = ((), *(score.likeliest for score in scores))
        found = self._of(token_ids[: 1 + len(scores)], logprobs, likeliest)
        self._characters += len(self._decoder.finish())  # its text is whole without the answer
        return found

    def _of(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float | None],
        likeliest: Sequence[TopLogprobs],
    ) -> TextLogprobs:
        found = TextLogprobs(
            tokens=[], token_logprobs=[], top_logprobs=[] if self._top else None, text_offset=[]
        )
        for place, (token, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
            name = self._name(token)
            own = None if logprob is None else _told(logprob)
            found.tokens.append(name)
            found.token_logprobs.append(own)
            found.text_offset.append(self._characters + self._left_behind(token))
            self._characters += len(self._decoder.push([token]))
            if found.top_logprobs is not None:
                tops = likeliest[place]
                named = {self._name(other): _told(value) for other, value in tops}
                found.top_logprobs.append(None if own is None else named | {name: own})
        return found

    def _left_behind(self, token: int) -> int:
        """Characters that are certain to stay unfinished, as this token begins another one."""
        begins = any(byte & 0xC0 != 0x80 for byte in self._tokenizer.token_bytes(token)[:1])
        return len(self._decoder.fork().finish()) if begins else 0

    def _name(self, token: int) -> str:
        return written(self._tokenizer.token_bytes(token))


def joined(parts: Sequence[TextLogprobs]) -> TextLogprobs | None:
    """Parts of one text, in order, as one."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return TextLogprobs(
        tokens=[token for part in parts for token in part.tokens],
        token_logprobs=[value for part in parts for value in part.token_logprobs],
        top_logprobs=None
        if any(part.top_logprobs is None for part in parts)
        else [top for part in parts for top in part.top_logprobs or ()],
        text_offset=[offset for part in parts for offset in part.text_offset],
    )


def chat_logprobs(tokenizer: Tokenizer, delta: Delta) -> ChatLogprobs:
    """Of the tokens of an answer, with the likeliest at each place if they were asked for."""

    def one(token: int, logprob: float) -> TopToken:
        data = tokenizer.token_bytes(token)
        return TopToken(token=written(data), logprob=_told(logprob), bytes=list(data))

    content = []
    for place, (token, logprob) in enumerate(zip(delta.token_ids, delta.logprobs, strict=True)):
        tops = delta.top_logprobs[place] if delta.top_logprobs else ()
        likeliest = [one(other, value) for other, value in tops]
        content.append(ChatToken(**dict(one(token, logprob)), top_logprobs=likeliest))
    return ChatLogprobs(content=content)
