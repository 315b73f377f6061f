"""Tokens to text: whole characters, and nothing that could still become a stop string."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from gptmoe.generate.output import TextStream
from gptmoe.text import Tokenizer


def pieces(tokenizer: Tokenizer, token_ids: Sequence[int], stop: Sequence[str]) -> list[str]:
    stream = TextStream(tokenizer, stop)
    out = []
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


@given(
    st.text("春风明月。a ", max_size=12),
    st.lists(st.text("春风明月。a ", min_size=1, max_size=3), max_size=3),
)
def test_joined_pieces_are_the_text_before_the_stop(
    tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    token_ids = [i for character in text for i in tokenizer.encode(character)]
    assert "".join(pieces(tokenizer, token_ids, stop)) == cut(text, stop)
