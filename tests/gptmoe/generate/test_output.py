"""Tokens to text: whole characters, and nothing that could still become a stop string."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.generate.output import TextStream, end_ids
from gptmoe.generate.params import SamplingParams
from gptmoe.text import Tokenizer


def pieces(
    tokenizer: Tokenizer, token_ids: Sequence[int], stop: Sequence[str], already: Sequence[int] = ()
) -> list[str]:
    """What a stream says of these tokens, behind `already`."""
    stream = TextStream(tokenizer, stop, already)
    out = list[str]()
    for token_id in token_ids:
        out.append(stream.push(token_id))
        if stream.stopped:
            break
    return [*out, stream.finish()]


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string that becomes complete."""
    for end in range(len(text) + 1):
        starts = [text[:end].find(s) for s in stop if s in text[:end]]
        if starts:
            return text[: min(starts)]
    return text


def test_a_character_of_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("龘")  # not in the corpus: bytes
    assert len(token_ids) > 1
    assert pieces(tokenizer, token_ids, ()) == [""] * (len(token_ids) - 1) + ["龘", ""]


def test_a_stop_string_over_several_tokens_is_never_shown(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("春风。明月。江上")
    assert "".join(pieces(tokenizer, token_ids, ["。明月"])) == "春风"


def test_what_only_began_like_a_stop_string_is_shown(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("春风。明日。")
    assert "".join(pieces(tokenizer, token_ids, ["。明月"])) == "春风。明日。"


TEXT = st.text("春风明月。a 龘é\u0301👩‍🚀", max_size=12)
"""Also characters of several tokens, of several code points, and of two such parts."""
STOPS = st.lists(st.text("春风明月。a 龘", min_size=1, max_size=3), max_size=3)


@given(TEXT, STOPS, st.booleans())
def test_joined_pieces_are_the_text_before_the_stop(
    tokenizer: Tokenizer, text: str, stop: list[str], whole: bool
) -> None:
    """However tokens divide the text."""
    parts = [text] if whole else list(text)
    token_ids = [token_id for part in parts for token_id in tokenizer.encode(part)]
    assert "".join(pieces(tokenizer, token_ids, stop)) == cut(text, stop)


class Words:
    """A tokenizer of given words, for tokens that hold several stop strings."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def token_bytes(self, token_id: int) -> bytes:
        return self.words[token_id].encode()


@given(st.lists(st.text("abc", max_size=5), min_size=1, max_size=4), st.data())
def test_the_stop_string_that_is_complete_first_counts(
    words: list[str], data: st.DataObject
) -> None:
    """Also where one token completes several."""
    stop = data.draw(st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
    tokenizer: Tokenizer = Words(*words)  # type: ignore[assignment]
    assert "".join(pieces(tokenizer, range(len(words)), stop)) == cut("".join(words), stop)


TOKENS = st.lists(st.integers(0, 3071), max_size=8)


@given(st.one_of(TOKENS, TEXT), STOPS)
def test_a_resumed_stream_says_the_rest_wherever_the_first_broke_off(
    tokenizer: Tokenizer, given_ids: list[int] | str, stop: list[str]
) -> None:
    """Any tokens, also such that are no UTF-8; and split characters and stop strings."""
    ids = tokenizer.encode(given_ids) if isinstance(given_ids, str) else given_ids
    whole = pieces(tokenizer, ids, stop)
    ids = ids[: len(whole) - 1]  # an answer ends at its stop string
    for place in range(len(ids)):
        sent = "".join(whole[:place])
        resumed = pieces(tokenizer, ids[place:], stop, already=ids[:place])
        assert sent + "".join(resumed) == "".join(whole)


def test_what_the_first_stream_held_back_still_comes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("春风。明月")
    place = len(ids) - len(tokenizer.encode("明月"))
    assert tokenizer.decode(ids[:place]) == "春风。"
    assert "".join(pieces(tokenizer, ids, ["。明日"])[:place]) == "春风"
    assert "".join(pieces(tokenizer, ids[place:], ["。明日"], already=ids[:place])) == "。明月"


def test_a_stream_behind_a_whole_stop_string_has_stopped(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["。"], already=tokenizer.encode("春风。"))
    assert stream.stopped
    assert stream.push(tokenizer.encode("明")[0]) == ""
    assert stream.finish() == ""


def test_forks_go_on_each_for_itself(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode("龘")[0], tokenizer.encode("龘")[1:]
    stream = TextStream(tokenizer, ["。明"])
    assert stream.push(tokenizer.encode("。")[0]) == ""
    assert stream.push(first) == ""
    twin = stream.fork()
    assert twin.finish() == "。\ufffd"
    assert "".join(map(stream.push, second)) == "。龘"
    assert not stream.stopped


@pytest.mark.parametrize(
    ("ignore_end", "stop_token_ids", "wanted"),
    [
        (False, (), {"end", "sep"}),
        (True, (), set()),
        (False, (7,), {"end", "sep", 7}),
        (True, (7, 9), {7, 9}),
    ],
)
def test_what_ends_an_answer(
    tokenizer: Tokenizer, ignore_end: bool, stop_token_ids: tuple[int, ...], wanted: set[int | str]
) -> None:
    params = SamplingParams(ignore_end=ignore_end, stop_token_ids=stop_token_ids)
    own: dict[int | str, int] = {"end": tokenizer.end_id, "sep": tokenizer.sep_id}
    assert end_ids(tokenizer, params) == {own.get(it, it) for it in wanted}


def test_an_own_end_token_may_be_asked_for(tokenizer: Tokenizer) -> None:
    params = SamplingParams(ignore_end=True, stop_token_ids=(tokenizer.end_id,))
    assert end_ids(tokenizer, params) == {tokenizer.end_id}
