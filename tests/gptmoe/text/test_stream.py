from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptmoe.errors import DataError
from gptmoe.text import StreamDecoder, Tokenizer

HARD_BYTES = [
    bytes([byte]) for byte in b"A\x80\x90\xa0\xbf\xc0\xc3\xe0\xe6\xed\xef\xf0\xf4\xf5\xff"
]
"""Starts and ends of characters of every length, and bytes that UTF-8 never or rarely allows."""


def stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    places = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    pieces = [decoder.push(ids[start:stop]) for start, stop in pairwise(places)]
    return [*pieces, decoder.finish()]


@settings(deadline=None, max_examples=300)
@given(text=st.text() | st.text("春天🙂é\u200d<sep>\n"), cuts=st.lists(st.integers(0, 100)))
def test_pieces_of_a_text_are_whole_characters(
    chinese: Tokenizer, text: str, cuts: list[int]
) -> None:
    pieces = stream(chinese, chinese.encode(text), cuts)
    assert "".join(pieces) == text
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")
    assert pieces[-1] == ""


@settings(deadline=None, max_examples=500)
@given(data=st.data(), cuts=st.lists(st.integers(0, 100)))
def test_pieces_of_any_ids_joined_are_the_decoded_text(
    chinese: Tokenizer, data: st.DataObject, cuts: list[int]
) -> None:
    every_id = range(chinese.vocab_size)
    hard_ids = [i for i in every_id if chinese.token_bytes(i) in HARD_BYTES]
    ids = data.draw(st.lists(st.sampled_from(hard_ids) | st.sampled_from(every_id)))
    assert "".join(stream(chinese, ids, cuts)) == chinese.decode(ids)


def test_half_a_character_is_held_back(chinese: Tokenizer) -> None:
    first, second, third = chinese.encode("龘")
    decoder = StreamDecoder(chinese)
    assert [decoder.push([token_id]) for token_id in (first, second, third)] == ["", "", "龘"]
    assert decoder.push([first]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(chinese.encode("春天")) == "春天", "finish starts afresh"


def test_an_unknown_id_is_refused(chinese: Tokenizer) -> None:
    with pytest.raises(DataError, match="token id 4096 is outside the vocabulary"):
        StreamDecoder(chinese).push([4096])
