import logging
import pickle
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gptmoe.errors import ConfigError, DataError
from gptmoe.text import Tokenizer, load_tokenizer, train_jiebabpe
from gptmoe.text.words import cut_words

TRICKY = [
    *("\n", "\r\n", "\r", "\t", " ", "   ", "\u3000", "\u200b", "\u200d", "\ufeff", "\x00", "\x85"),
    *("é", "e\u0301", "\u0301", "👩‍👩‍👧", "🇨🇳", "𠀀", "\ufffd", "\U0010ffff", "ｶﾞ", "لا"),
    *("春天", "河面上", "，", "。", "abc", "3.14%", "C++", "Ġ", "Ċ", "č", "<", ">", "|"),
    *("<sep>", "<|endoftext|>", "<|endoftext|", "sep>"),
]
texts = st.text() | st.lists(st.sampled_from(TRICKY) | st.text(max_size=3)).map("".join)


@settings(deadline=None, max_examples=300)
@given(text=texts)
def test_any_text_comes_back(chinese: Tokenizer, text: str) -> None:
    ids = chinese.encode(text)
    assert chinese.decode(ids) == text
    assert not {chinese.end_id, chinese.sep_id} & set(ids), "special tokens in a text are text"
    assert b"".join(map(chinese.token_bytes, ids)) == text.encode()
    characters = chinese.characters_per_token()
    assert sum(characters[token_id] for token_id in ids) == len(text)


@settings(deadline=None)
@given(text=texts)
def test_special_tokens_count_only_when_asked_for(chinese: Tokenizer, text: str) -> None:
    ids = chinese.encode(text, allow_special=True)
    assert ids.count(chinese.sep_id) == text.count("<sep>")
    assert ids.count(chinese.end_id) == text.count("<|endoftext|>")
    assert chinese.decode(ids) == text
    plain = text.replace("<sep>", "").replace("<|endoftext|>", "")
    assert chinese.decode(ids, skip_special=True) == plain


@settings(deadline=None)
@given(text=texts)
def test_no_token_crosses_a_word(chinese: Tokenizer, text: str) -> None:
    words = accumulate(len(word.encode()) for word in cut_words(text))
    tokens = accumulate(len(chinese.token_bytes(token_id)) for token_id in chinese.encode(text))
    assert set(words) <= set(tokens)


def test_ids_are_those_hugging_face_gives_to_the_words(
    chinese: Tokenizer, chinese_folder: Path, lines: list[str]
) -> None:
    reader = tokenizers.Tokenizer.from_file(str(chinese_folder / "tokenizer.json"))
    text = "\n".join(lines)
    assert reader.encode(cut_words(text), is_pretokenized=True).ids == chinese.encode(text)
    assert reader.decode(chinese.encode(text), skip_special_tokens=False) == text
    assert reader.get_vocab_size() == chinese.vocab_size


def test_named_tokens(chinese: Tokenizer, chinese_folder: Path) -> None:
    reader = tokenizers.Tokenizer.from_file(str(chinese_folder / "tokenizer.json"))
    assert reader.token_to_id("<|endoftext|>") == chinese.end_id
    assert reader.token_to_id("<sep>") == chinese.sep_id
    (newline_id,) = chinese.encode("\n")
    assert reader.token_to_id("\n") == newline_id
    assert chinese.encode("a\n\nb").count(newline_id) == 2
    assert chinese.token_bytes(chinese.sep_id) == b"<sep>"
    assert chinese.characters_per_token()[chinese.sep_id] == 0


def test_saved_and_loaded_it_is_the_same(
    chinese: Tokenizer, chinese_folder: Path, lines: list[str]
) -> None:
    for loaded in (
        load_tokenizer(chinese_folder),
        load_tokenizer(f"{chinese_folder}/tokenizer.json"),
    ):
        assert loaded.kind == chinese.kind == "jiebabpe"
        assert loaded.digest == chinese.digest
        assert [loaded.encode(line) for line in lines] == [chinese.encode(line) for line in lines]
    assert [file.name for file in chinese_folder.iterdir()] == ["tokenizer.json"]


def test_common_words_become_one_token(chinese: Tokenizer) -> None:
    assert len(chinese.encode("河面")) == 1
    assert len(chinese.encode("龘")) == 3, "a character not seen in training is its three bytes"


def test_vocabulary_has_the_size_asked_for_and_every_byte(lines: list[str]) -> None:
    for vocab_size in 260, 300, 350:
        tokenizer = train_jiebabpe(lines, vocab_size)
        assert tokenizer.vocab_size == vocab_size
        assert {bytes([byte]) for byte in range(256)} <= {
            tokenizer.token_bytes(token_id) for token_id in range(vocab_size)
        }


def test_vocabulary_tells_the_truth_when_the_corpus_is_too_small(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = train_jiebabpe(["春天", "春天"], 5000)
    assert tokenizer.vocab_size == 259 + 5, "two characters of three bytes need five merges"
    assert "fills 264 of the 5000 tokens" in caplog.text
    assert tokenizer.encode("春天") == [263]


def test_training_twice_gives_the_same_file(lines: list[str], tmp_path: Path) -> None:
    for name in "ab":
        train_jiebabpe(iter(lines), 380).save(tmp_path / name)
    first, second = ((tmp_path / name / "tokenizer.json").read_bytes() for name in "ab")
    assert first == second
    assert train_jiebabpe(lines, 380).digest != train_jiebabpe(lines, 379).digest


def test_training_reports_how_many_texts_it_has_read(lines: list[str]) -> None:
    counts: list[int] = []
    train_jiebabpe(lines, 300, counts.append)
    assert counts == list(range(1, len(lines) + 1))


def test_special_tokens_in_the_corpus_are_text() -> None:
    tokenizer = train_jiebabpe(["<sep><|endoftext|>"] * 50, 270)
    ids = tokenizer.encode("<sep>")
    assert tokenizer.sep_id not in ids
    assert tokenizer.decode(ids) == "<sep>"


@pytest.mark.parametrize("vocab_size", [-1, 0, 256, 259])
def test_a_vocabulary_without_room_is_refused(vocab_size: int, lines: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"vocab_size={vocab_size} must be over 259"):
        train_jiebabpe(lines, vocab_size)


@pytest.mark.parametrize("corpus", [[], [""], ["", " \n", "\u3000"]])
def test_a_corpus_without_text_is_refused(corpus: list[str]) -> None:
    with pytest.raises(DataError, match="the corpus holds no text"):
        train_jiebabpe(corpus, 300)


def test_a_lone_surrogate_is_refused(chinese: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"character 2 of the text is U\+D83D, a lone surrogate"):
        chinese.encode("春天\ud83d")
    with pytest.raises(DataError, match="lone surrogate"):
        train_jiebabpe(["春天", "\udc00"], 300)


@pytest.mark.parametrize("token_id", [-1, 400, 51199])
def test_an_id_outside_the_vocabulary_is_refused(chinese: Tokenizer, token_id: int) -> None:
    with pytest.raises(DataError, match=f"token id {token_id} is outside the vocabulary of"):
        chinese.decode([5, token_id])


def test_bytes_that_are_not_utf8_become_replacement_characters(chinese: Tokenizer) -> None:
    first, second, third = chinese.encode("龘")
    assert chinese.decode([first, second]) == "\ufffd"
    assert chinese.decode([third, third]) == "\ufffd\ufffd"


def test_processes_that_start_together_are_silent_and_agree(
    chinese: Tokenizer, lines: list[str], tmp_path: Path
) -> None:
    """Each unpickles the tokenizer and builds jieba's dictionary, with one temporary folder."""
    (tmp_path / "pickle").write_bytes(pickle.dumps((chinese, lines)))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    code = (
        "import pickle, sys; tokenizer, lines = pickle.load(open(sys.argv[1], 'rb'));"
        "print([tokenizer.encode(line) for line in lines])"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "pickle")],
            cwd=Path(__file__).parents[3],
            env={"TMPDIR": str(scratch)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for child in children:
        output, errors = child.communicate(timeout=60)
        assert errors == ""
        assert output.strip() == str([chinese.encode(line) for line in lines])
    assert list(scratch.iterdir()) == []
