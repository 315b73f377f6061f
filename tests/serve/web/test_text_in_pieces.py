"""Whatever the tokens: a streamed text is whole characters, joined the text itself."""

import asyncio
from collections.abc import Sequence
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptmoe.generate.params import SamplingParams
from serve.service import Call, Service
from serve.web.logprobs import TextScores, written
from serve.web.completions import CompletionBody, _Writer
from serve.web.openai import Head, pieces
from serve.web.streams import collected, together
from tests.serve.web.browser import Browser, events
from tests.serve.web.conftest import CARD
from tests.serve.web.talker import Talker

FAMILY = "👨‍👩‍👧‍👦"
COMBINED = "é̂ข้อ"
"""Letters with signs of their own code points."""

texts = st.lists(
    st.sampled_from(["春", "风", "，", "𠮷", FAMILY, COMBINED, "🇨🇳", "a", "\n", "\u200d"]),
    min_size=1,
    max_size=8,
).map("".join)


class Split:
    """A tokenizer whose tokens are one text's bytes, cut at given places."""

    kind, end_id, sep_id, digest = "split", 0, 1, "0" * 12

    def __init__(self, text: str, cuts: Sequence[int]) -> None:
        data = text.encode()
        places = [0, *sorted({cut % len(data) for cut in cuts} - {0}), len(data)]
        self.tokens = [data[a:b] for a, b in zip(places, places[1:], strict=False)]
        self.vocab_size = len(self.tokens) + 100

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        return [0]

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id] if token_id < len(self.tokens) else b"?"
