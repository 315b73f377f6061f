"""Whatever the tokens: a streamed text is whole characters, joined the text itself."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve.service import Service
from serve.web.app import build
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
        self.tokens = [data[a:b] for a, b in pairwise(places)]
        self.vocab_size = len(self.tokens) + 100

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        return [0]

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id] if token_id < len(self.tokens) else b"?"


class Speaker:
    """An application that says one text in one split."""

    def __init__(self) -> None:
        self.service = Service(Talker(Split("春", []), [0]), Split("春", []), CARD)
        self.browser = Browser(build(self.service, stall_s=60))

    def split(self, text: str, cuts: Sequence[int]) -> Split:
        """From now on; answers its tokens."""
        split = Split(text, cuts)
        self.service.tokenizer = split
        self.service.card = replace(CARD, vocab_size=split.vocab_size)
        talker = self.service._engine
        talker.tokenizer = split
        talker.begin(range(len(split.tokens)))
        return split


SPEAKER = Speaker()

every_split = given(texts, st.lists(st.integers(0, 200), max_size=60))


def check_pieces(pieces: list[str], text: str) -> None:
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=60)
@every_split
@example(FAMILY + COMBINED + "春", list(range(200)))
@example("春风", [1, 2, 4, 5])
def test_pieces_of_a_completion(text: str, cuts: list[int]) -> None:
    split = SPEAKER.split(text, cuts)
    asked: dict[str, Any] = {"prompt": [0], "max_tokens": len(split.tokens), "logprobs": 0}
    *chunks, _ = events(SPEAKER.browser.complete(**asked, stream=True))
    choices = [chunk["choices"][0] for chunk in chunks]
    check_pieces([choice["text"] for choice in choices], text)
    [whole] = SPEAKER.browser.complete(**asked).json()["choices"]
    assert whole["text"] == text
    written = "".join(whole["logprobs"]["tokens"])
    assert "\ufffd" not in written
    offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
    starts = [len(b"".join(split.tokens[:k]).decode(errors="ignore")) for k in range(len(offsets))]
    assert offsets == whole["logprobs"]["text_offset"] == starts


@settings(max_examples=60)
@every_split
@example(FAMILY + COMBINED + "春", list(range(200)))
def test_pieces_of_a_chat(text: str, cuts: list[int]) -> None:
    split = SPEAKER.split(text, cuts)
    asked = {"max_tokens": len(split.tokens), "logprobs": True}
    *chunks, _ = events(SPEAKER.browser.chat("你好", **asked, stream=True))
    choices = [chunk["choices"][0] for chunk in chunks]
    check_pieces([choice["delta"].get("content", "") for choice in choices], text)
    tokens = [t for choice in choices for t in (choice["logprobs"] or {}).get("content", ())]
    assert b"".join(bytes(token["bytes"]) for token in tokens) == text.encode()


@settings(max_examples=60)
@every_split
@example(FAMILY + COMBINED + "春\n", list(range(200)))
def test_pieces_of_the_eas_shape(text: str, cuts: list[int]) -> None:
    split = SPEAKER.split(text, cuts)
    asked = {"parameters": {"max_length": len(split.tokens)}}
    pieces = events(SPEAKER.browser.post(["?"], path="/generate/stream", **asked))
    check_pieces([piece["text"] for piece in pieces], text.replace("\n", "\\n"))


def test_offsets_count_characters_that_stay_unfinished() -> None:
    """In a prompt's text, which ends with it, and in an answer's."""
    SPEAKER.split("春风月", [3, 6]).tokens[0] = b"\xe6"
    [choice] = SPEAKER.browser.complete([0], max_tokens=3, logprobs=0, echo=True).json()["choices"]
    assert choice["text"] == "\ufffd\ufffd风月"
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]


def test_an_answer_that_ends_inside_a_character_says_so() -> None:
    SPEAKER.split("春", [1])
    [choice] = SPEAKER.browser.complete([0], max_tokens=1, logprobs=1).json()["choices"]
    assert choice["text"] == "\ufffd"
    assert choice["logprobs"]["tokens"] == ["bytes:\\xe6"]
