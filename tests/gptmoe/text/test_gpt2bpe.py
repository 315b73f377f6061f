import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptmoe.text import Tokenizer, load_tokenizer
from gptmoe.text.bytelevel import BYTE_OF_CHARACTER
from gptmoe.text.gpt2bpe import Gpt2Bpe

PUBLISHED = Path(__file__).parents[4] / "shared" / "data" / "gpt2bpe"


@pytest.fixture(scope="module")
def small() -> Gpt2Bpe:
    """A vocabulary of GPT-2's form: 256 bytes, four merges, the end token last."""
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "Ġ")]
    tokens = [*BYTE_OF_CHARACTER, *(left + right for left, right in merges), "<|endoftext|>"]
    return Gpt2Bpe({token: index for index, token in enumerate(tokens)}, merges)


@pytest.fixture(scope="module")
def published() -> Tokenizer:
    if not PUBLISHED.is_dir():
        pytest.skip(f"GPT-2's files are not at {PUBLISHED}")
    return load_tokenizer(PUBLISHED)


def test_every_published_case(published: Tokenizer) -> None:
    lines = (PUBLISHED / "cases.jsonl").read_text(encoding="utf-8").split("\n")
    cases = [json.loads(line) for line in lines if line]
    assert cases
    for case in cases:
        assert published.encode(case["text"]) == case["ids"]
        assert published.decode(case["ids"]) == case["text"]


def test_published_vocabulary(published: Tokenizer) -> None:
    assert published.kind == "gpt2bpe"
    assert published.vocab_size == 50257
    assert published.end_id == published.sep_id == 50256
    assert published.encode("a<|endoftext|>", allow_special=True) == [64, 50256]
    assert published.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]


def test_published_files_survive_saving(published: Tokenizer, tmp_path: Path) -> None:
    published.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"vocab.json", "merges.txt"}
    assert load_tokenizer(tmp_path).digest == published.digest
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8")
    assert merges == (PUBLISHED / "vocab.bpe").read_text(encoding="utf-8")


def test_merges_stay_inside_the_pieces_of_the_pattern(small: Gpt2Bpe) -> None:
    def pieces(text: str) -> list[bytes]:
        return [small.token_bytes(token_id) for token_id in small.encode(text)]

    assert pieces("the the") == [b"the", b" the"]
    assert pieces("the   the") == [b"the", b"  ", b" the"]


@settings(deadline=None, max_examples=300)
@given(
    text=st.text()
    | st.lists(st.sampled_from(["the", " ", "\n", "<|endoftext|>", "🙂"])).map("".join)
)
def test_any_text_comes_back(small: Gpt2Bpe, text: str) -> None:
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert small.end_id not in ids
    characters = small.characters_per_token()
    assert sum(characters[token_id] for token_id in ids) == len(text)
    assert small.encode(text, allow_special=True).count(small.end_id) == text.count("<|endoftext|>")


def test_both_pairs_of_names_and_hugging_faces_file_are_read(
    small: Gpt2Bpe, tmp_path: Path
) -> None:
    small.save(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "vocab.json").rename(tmp_path / "b" / "encoder.json")
    (tmp_path / "a" / "merges.txt").rename(tmp_path / "b" / "vocab.bpe")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "tokenizer.json").write_text(small.to_json(), encoding="utf-8")
    for name in "bc":
        loaded = load_tokenizer(tmp_path / name)
        assert (loaded.kind, loaded.digest) == ("gpt2bpe", small.digest)
