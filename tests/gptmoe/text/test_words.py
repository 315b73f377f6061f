from pathlib import Path

import jieba
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptmoe.text.words import MAX_RUN, cut_words

ARTICLE = (
    "南京市长江大桥建成以后，工信处女干事每月经过下属科室都要亲口交代24口交换机等事情。\n" * 30
)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> jieba.Tokenizer:
    """jieba as it comes, with its own cache file."""
    tokenizer = jieba.Tokenizer()
    tokenizer.tmp_dir = str(tmp_path_factory.mktemp("jieba"))
    return tokenizer


@settings(deadline=None)
@given(st.text())
def test_words_joined_are_the_text(text: str) -> None:
    assert "".join(cut_words(text)) == text


@pytest.mark.parametrize("text", [ARTICLE, "a b\tc\n\nd　e 3.14% C++", "", "\r", "𠀀🙂é"])
def test_words_are_those_of_jieba(text: str, oracle: jieba.Tokenizer) -> None:
    assert cut_words(text) == oracle.lcut(text)


def test_newline_is_a_word_even_after_a_carriage_return() -> None:
    assert cut_words("春\r\n\n天") == ["春", "\r", "\n", "\n", "天"]


def test_words_added_to_the_shared_jieba_change_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(jieba.dt, "tmp_dir", str(tmp_path))
    before = cut_words("渔船离开码头")
    jieba.add_word("船离开码", freq=10**9)
    try:
        assert jieba.lcut("渔船离开码头") != before
        assert cut_words("渔船离开码头") == before
    finally:
        jieba.del_word("船离开码")


@pytest.mark.parametrize("character", ["龘", "的", "a", "-"])
def test_a_run_without_marks_is_cut_so_that_time_stays_linear(character: str) -> None:
    run = character * (2 * MAX_RUN + 7)
    words = cut_words(f"春天，{run}，{run}")
    assert "".join(words) == f"春天，{run}，{run}"
    assert max(map(len, words)) <= MAX_RUN
    pieces = 2 * cut_words(character * MAX_RUN) + cut_words(character * 7)
    assert words == ["春天", "，", *pieces, "，", *pieces]
