"""The bundled corpus: its shape, its size, and that none of it stands in a known collection."""

import gzip
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
POEMS = ROOT / "configs" / "corpus" / "poems.tsv"
COLLECTION = ROOT.parent / "shared" / "data" / "poetry"

HAN = "[\u4e00-\u9fff]"
COUPLET_5 = f"{HAN}{{5}}，{HAN}{{5}}[。？！]"
COUPLET_7 = f"{HAN}{{7}}，{HAN}{{7}}[。？！]"
POEM = re.compile(f"(?:{COUPLET_5}){{2}}|(?:{COUPLET_5}){{4}}|(?:{COUPLET_7}){{2}}")
MARKS = re.compile("[，。？！；：、\\s]+")


def poems() -> list[str]:
    text = POEMS.read_bytes().decode("utf-8", errors="strict")
    assert text.endswith("\n")
    return text[:-1].split("\n")


def verses(text: str) -> list[str]:
    return [verse for verse in MARKS.split(text) if verse]


def repeated(items: list[str]) -> list[str]:
    return [item for item, count in Counter(items).items() if count > 1]


def test_corpus_is_large_enough_to_train_on_and_small_enough_to_ship() -> None:
    assert len(poems()) >= 400
    assert POEMS.stat().st_size < 200_000


def test_every_line_is_one_well_formed_poem() -> None:
    assert [poem for poem in poems() if not POEM.fullmatch(poem)] == []


def test_five_and_seven_character_poems_are_both_well_represented() -> None:
    lengths = Counter(len(verses(poem)[0]) for poem in poems())
    assert set(lengths) == {5, 7}
    assert min(lengths.values()) >= len(poems()) // 3


def test_no_poem_and_no_verse_occurs_twice() -> None:
    assert repeated(poems()) == []
    assert repeated([verse for poem in poems() for verse in verses(poem)]) == []


def test_no_verse_occurs_in_the_poetry_collection() -> None:
    train, dev = COLLECTION / "train.tsv.gz", COLLECTION / "dev.tsv"
    if not (train.is_file() and dev.is_file()):
        pytest.skip(f"no poetry collection to compare with: {train} and {dev} are not there")
    with gzip.open(train, "rt", encoding="utf-8") as lines:
        known = set(verses(lines.read()))
    known.update(verses(dev.read_text(encoding="utf-8")))
    assert [verse for poem in poems() for verse in verses(poem) if verse in known] == []
