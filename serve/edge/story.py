"""What a stream has told its caller, so that another replica can go on where one stopped."""

import time
from collections.abc import Callable

from protos import generation_pb2 as messages

from .patience import OtherText


class Story:
    """Follows one stream of chunks with one answer, over as many replicas as it takes.

    The same request gives the same tokens on any replica. Another one is asked to go on from before
    the last tokens that were sent, not from behind them: then it has at least one token to choose,
    even where only the finish is missing, and what it repeats shows that it tells the same story.
    What it repeats is left out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began_s = clock, clock()
        self.finished = False
        """The last chunk was told."""
        self._header_told = False
        self._sure: list[int] = []
        self._last: list[int] = []
        self._text_since_last = ""
        self._first_token_s: float | None = None
        self._logprob = 0.0
        self._resumed = False
        self._repeated_ids: list[int] = []
        self._repeated_text = ""
        self._sent_by_this = 0

    @property
    def begun(self) -> bool:
        """The caller has heard something."""
        return self._header_told or bool(self._last)

    def resume(self) -> list[int]:
        """The tokens behind which another replica is to go on; its chunks follow."""
        self._resumed = True
        self._repeated_ids = list(self._last)
        self._repeated_text = self._text_since_last
        self._sent_by_this = 0
        return list(self._sure)

    def tell(self, data: bytes) -> bytes | None:
        """What the caller is to hear of a replica's chunk; None: nothing that is new.

        Raises OtherText if another replica does not tell the same: its weights are others.
        """
        chunk = messages.GenerateChunk.FromString(data)
        self._sent_by_this += len(chunk.token_ids)
        if self._resumed:
            self._leave_out_repeated(chunk)
        self._remember(chunk)
        if not self._resumed:
            return data
        if chunk.HasField("finish"):
            self._account(chunk.finish)
        return chunk.SerializeToString() or None

    def _leave_out_repeated(self, chunk: messages.GenerateChunk) -> None:
        if self._header_told:
            chunk.ClearField("header")
        if self._last:
            chunk.ClearField("prompt_logprobs")
        ids, text = self._repeated_ids, self._repeated_text
        count, length = min(len(ids), len(chunk.token_ids)), min(len(text), len(chunk.text))
        same = list(chunk.token_ids[:count]) == ids[:count] and chunk.text[:length] == text[:length]
        if not same or (_ends_by_itself(chunk) and (ids[count:] or text[length:])):
            raise OtherText(
                "the replica that wrote this text is gone, and the others would write another one: "
                "their weights have changed; send the request again"
            )
        for repeated in (chunk.token_ids, chunk.logprobs, chunk.top_logprobs):
            del repeated[:count]
        chunk.text = chunk.text[length:]
        self._repeated_ids, self._repeated_text = ids[count:], text[length:]

    def _remember(self, chunk: messages.GenerateChunk) -> None:
        self._header_told |= chunk.HasField("header")
        self.finished |= chunk.HasField("finish")
        self._logprob += sum(chunk.logprobs)
        if chunk.token_ids:
            if self._first_token_s is None:
                self._first_token_s = self._clock() - self._began_s
            self._sure += self._last
            self._last, self._text_since_last = list(chunk.token_ids), ""
        self._text_since_last += chunk.text

    def _account(self, finish: messages.StreamFinish) -> None:
        """The finish counts what one replica did: make it what all did together."""
        if finish.completion_tokens == self._sent_by_this:
            finish.completion_tokens = len(self._sure) + len(self._last)
        if finish.cumulative_logprob:
            finish.cumulative_logprob = self._logprob
        if finish.HasField("timings"):
            finish.timings.first_token_s = self._first_token_s or 0.0
            finish.timings.total_s = self._clock() - self._began_s


def _ends_by_itself(chunk: messages.GenerateChunk) -> bool:
    """An abort may come before all was repeated: that text is not another one."""
    return chunk.HasField("finish") and chunk.finish.reason != messages.FINISH_REASON_ABORT
