"""Generated tokens to text: whole characters, and nothing that may yet start a stop string."""

from collections.abc import Sequence

from gptmoe.text import StreamDecoder, Tokenizer


class TextStream:
    """Text of one request. Pieces joined = the decoded tokens, cut before the first stop string."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], already: Sequence[int] = ()
    ) -> None:
        self.decoder = StreamDecoder(tokenizer)
        self.stop = tuple(stop)
        self.held = ""
        self.stopped = False
        for token in already:
            self.push(token)

    def push(self, token_id: int) -> str:
        """Text that this token makes certain; `stopped` turns True at a complete stop string."""
        return self._release(self.decoder.push([token_id]), last=False)

    def finish(self) -> str:
        """The rest, after the last token."""
        return self._release(self.decoder.finish(), last=True)

    def _release(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self.held + text
        ends = [index for index in (text.find(stop) for stop in self.stop) if index >= 0]
        if ends:
            self.stopped, self.held = True, ""
            return text[: min(ends)]
        keep = 0 if last else self._possible_start(text)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that is a proper start of a stop string."""
        longest = 0
        for stop in self.stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
