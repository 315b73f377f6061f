"""Token ids that arrive one by one, to text that can be shown at once."""

import codecs
from collections.abc import Iterable

from .protocol import Tokenizer


class StreamDecoder:
    """Decodes a growing sequence; the pieces joined are `tokenizer.decode` of all ids.

    A character whose bytes are spread over several tokens is held back until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these ids complete, perhaps none. Raises DataError for an unknown id."""
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, token_ids)))

    def finish(self) -> str:
        """The rest: U+FFFD if the sequence ends inside a character, else nothing. Starts afresh."""
        return self._decoder.decode(b"", final=True)

    def fork(self) -> "StreamDecoder":
        """Another decoder that has come as far."""
        twin = StreamDecoder(self._tokenizer)
        twin._decoder.setstate(self._decoder.getstate())
        return twin
