"""Generated tokens to text: whole characters, and nothing that may yet start a stop string."""

import copy
from collections.abc import Sequence

from gptmoe.text import StreamDecoder, Tokenizer

from .params import SamplingParams


def end_ids(tokenizer: Tokenizer, params: SamplingParams) -> frozenset[int]:
    """The tokens that end an answer; its text ends before them.

    The request's stop_token_ids always do, the model's own two unless the request ignores them.
    """
    own = () if params.ignore_end else (tokenizer.end_id, tokenizer.sep_id)
    return frozenset((*own, *params.stop_token_ids))


class TextStream:
    """Text of one answer. Pieces joined = the decoded tokens, cut before the first stop string.

    The first stop string is the one that is complete first, and of several the longest: the cut
    does not depend on how tokens divide the text.

    `already` are tokens of which an earlier stream has sent all that they make certain. Their text
    is not sent again; what the earlier stream held back is. If they hold a whole stop string,
    `stopped` is True from the start.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], already: Sequence[int] = ()
    ) -> None:
        self.decoder = StreamDecoder(tokenizer)
        self.stop = tuple(stop)
        self.held = ""
        self.stopped = False
        for token_id in already:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """Text that this token makes certain; `stopped` turns True at a complete stop string."""
        return self._release(self.decoder.push([token_id]), last=False)

    def finish(self) -> str:
        """The rest, after the last token."""
        return self._release(self.decoder.finish(), last=True)

    def fork(self) -> "TextStream":
        """Another stream that has come as far, for a second way to go on."""
        twin = copy.copy(self)
        twin.decoder = self.decoder.fork()
        return twin

    def _release(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self.held + text
        found = [(text.find(stop), len(stop)) for stop in self.stop]
        ends = [(start + length, start) for start, length in found if start >= 0]
        if ends:
            self.stopped, self.held = True, ""
            return text[: min(ends)[1]]
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
