"""Preparing: what is written, how it is divided, that it is whole or absent."""

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptmoe.data import LineSamples, Manifest, Progress, Split, is_prepared, open_samples, prepare
from gptmoe.errors import ConfigError, DataError, GptMoeError

Make = Callable[..., Path]
SPLITS: tuple[Split, ...] = ("train", "validation")


def documents(folder: Path, split: Split) -> list[str]:
    """The texts of a pretraining split of bytes."""
    token_ids = Manifest.load(folder).tokens(folder, split).tolist()
    ends = [i for i, token_id in enumerate(token_ids) if token_id == 256]
    starts = [0, *(end + 1 for end in ends)]
    return [bytes(token_ids[s:e]).decode() for s, e in zip(starts, ends, strict=False)]


def corpus(tmp_path: Path, num_lines: int, name: str = "a.tsv") -> Path:
    path = tmp_path / name
    path.write_text("".join(f"第{i}首诗。{'春' * (i % 50)}\n" for i in range(num_lines)), "utf-8")
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_are_joined_by_the_end_token_and_counted(make: Make) -> None:
    folder = make("a.txt", "春眠\n不觉晓\n\n处处闻啼鸟", kind="pretrain")
    manifest = Manifest.load(folder)
    stored = manifest.tokens(folder, "train")
    assert stored.dtype == np.uint16
    assert isinstance(stored, np.memmap)
    assert documents(folder, "train") == ["春眠\n不觉晓", "处处闻啼鸟"]
    counts = manifest.splits["train"]
    assert (counts.documents, counts.characters, counts.tokens) == (2, 11, len(stored))
    assert manifest.splits["validation"].documents == 0
    assert (manifest.recipe.kind, manifest.recipe.tokenizer_kind) == ("pretrain", "bytes")


def test_ids_over_16_bits_are_kept(tmp_path: Path, wide_tokenizer: Any) -> None:
    prepare([corpus(tmp_path, 1)], wide_tokenizer, tmp_path / "out", kind="pretrain")
    stored = Manifest.load(tmp_path / "out").tokens(tmp_path / "out", "train")
    assert stored.dtype == np.uint32
    assert stored[-1] == 2**16


def test_the_number_of_workers_changes_no_byte(tmp_path: Path, tokenizer: Any) -> None:
    source = corpus(tmp_path, 9000)
    folders = [tmp_path / f"out{workers}" for workers in (0, 1, 2)]
    for workers, folder in enumerate(folders):
        prepare(
            [source],
            tokenizer,
            folder,
            kind="finetune",
            validation_fraction=0.1,
            workers=workers,
        )
    first = content(folders[0])
    assert set(first) == {
        "manifest.json",
        *(f"{split}-{part}.bin" for split in SPLITS for part in ("tokens", "rows")),
    }
    assert all(content(folder) == first for folder in folders[1:])


def test_the_split_is_by_content(make: Make) -> None:
    lines = [f"第{i % 700}首" for i in range(2100)]
    folder = make("a.tsv", "\n".join(lines), kind="pretrain", validation_fraction=0.1)
    train, validation = (Counter(documents(folder, split)) for split in SPLITS)
    assert train + validation == Counter(lines)
    assert not set(train) & set(validation)
    assert 40 < len(validation) < 100  # about 70 of 700


def test_the_split_does_not_depend_on_the_order_of_documents(make: Make, tmp_path: Path) -> None:
    lines = [f"第{i}首" for i in range(300)]
    one = set(
        documents(
            make("a.tsv", "\n".join(lines), kind="pretrain", validation_fraction=0.1), "validation"
        )
    )
    (tmp_path / "prepared").rename(tmp_path / "first")
    other = make("b.tsv", "\n".join(lines[::-1]), kind="pretrain", validation_fraction=0.1)
    assert set(documents(other, "validation")) == one


@pytest.mark.parametrize(
    "lines", [["甲", "乙"], ["甲", "乙", "甲", "乙", "丙"], ["甲"] * 3 + ["乙"]]
)
def test_a_tiny_corpus_gets_one_validation_text(make: Make, lines: list[str]) -> None:
    folder = make("a.tsv", "\n".join(lines), kind="pretrain", validation_fraction=1e-9)
    train, validation = (documents(folder, split) for split in SPLITS)
    assert sorted(train + validation) == sorted(lines)
    assert len(set(validation)) == 1
    assert not set(train) & set(validation)


def test_equal_sources_with_other_targets_are_other_documents(make: Make) -> None:
    rows = [{"src_txt": "诗：", "tgt_txt": word} for word in ("春", "夏", "秋", "冬")]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    folder = make("a.jsonl", text, kind="finetune", validation_fraction=1e-9)
    counts = Manifest.load(folder).splits
    assert (counts["train"].documents, counts["validation"].documents) == (3, 1)
    stored = b"".join(
        bytes(i for i in Manifest.load(folder).tokens(folder, split).tolist() if i < 256)
        for split in SPLITS
    ).decode()
    assert sorted(stored.replace("诗：", "")) == sorted("春夏秋冬")


def test_equal_documents_cannot_be_divided(make: Make) -> None:
    folder = make("a.tsv", "甲\n甲\n甲", kind="pretrain", validation_fraction=0.5**40)
    assert documents(folder, "train") == ["甲"] * 3
    with pytest.raises(DataError, match=r"validation split of .* is empty; .* two different doc"):
        open_samples(folder, "validation", 2, 0)


def test_a_split_that_leaves_no_training_text_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all 2 documents fell into the validation split; lower"):
        make("a.tsv", "甲\n乙", kind="pretrain", validation_fraction=0.999999)
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_fraction_out_of_range_is_refused(make: Make, fraction: float) -> None:
    with pytest.raises(ConfigError, match=rf"validation_fraction={fraction} must be at least 0"):
        make("a.tsv", "甲\n乙", kind="pretrain", validation_fraction=fraction)


def test_validation_files_are_the_validation_split(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    train, held_out = corpus(tmp_path, 5), tmp_path / "dev.jsonl"
    held_out.write_text('{"text": "验"}\n', "utf-8")
    options: dict[str, Any] = {"kind": "pretrain", "validation_fraction": 0.5}
    prepare([train], tokenizer, tmp_path / "out", validation=[held_out], **options)
    assert documents(tmp_path / "out", "validation") == ["验"]
    assert len(documents(tmp_path / "out", "train")) == 5
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        prepare([train], tokenizer, tmp_path / "same", validation=[train], **options)
    assert "a.tsv is training and validation data" in caplog.text


def test_finetuning_rows(make: Make) -> None:
    rows = [("问", "答"), ("春眠", "不觉晓")]
    text = "".join(json.dumps({"src_txt": s, "tgt_txt": t}) + "\n" for s, t in rows)
    folder = make("a.jsonl", text, kind="finetune")
    manifest = Manifest.load(folder)
    assert manifest.has_targets
    assert manifest.splits["train"].characters == 7
    expected = [[*f"{s}{t}".encode(), 257] for s, t in rows]
    assert manifest.tokens(folder, "train").tolist() == [*expected[0], *expected[1]]
    assert manifest.rows(folder, "train").tolist() == [[7, 3], [7 + 16, 6]]


def test_separators_in_a_source_become_the_token(make: Make) -> None:
    text = json.dumps({"src_txt": "A[SEP]B[SEP]", "tgt_txt": "[SEP]"})
    folder = make("a.jsonl", text, kind="finetune", sep_text="[SEP]")
    stored = Manifest.load(folder).tokens(folder, "train").tolist()
    assert stored == [ord("A"), 257, ord("B"), 257, *b"[SEP]", 257]


def test_blank_rows_are_left_out_and_counted(make: Make) -> None:
    rows = [("问", "答"), (" ", "答"), ("问", "")]
    text = "".join(json.dumps({"src_txt": s, "tgt_txt": t}) + "\n" for s, t in rows)
    manifest = Manifest.load(make("a.jsonl", text, kind="finetune"))
    assert (manifest.empty_rows, manifest.splits["train"].documents) == (2, 1)


def test_only_blank_rows_are_refused(make: Make) -> None:
    with pytest.raises(DataError, match="holds no text: all its 2 rows are blank"):
        make("a.jsonl", '{"text": " "}\n{"text": ""}', kind="pretrain")


def test_progress_rises_to_one(tmp_path: Path, tokenizer: Any) -> None:
    sources = [corpus(tmp_path, 5000), corpus(tmp_path, 5000, "b.tsv")]
    seen: list[Progress] = []
    manifest = prepare(sources, tokenizer, tmp_path / "out", kind="pretrain", progress=seen.append)
    assert len(seen) > 5
    assert [p.fraction for p in seen] == sorted(p.fraction for p in seen)
    assert seen[-1].fraction == 1
    assert (seen[-1].documents, seen[-1].tokens) == (10_000, manifest.splits["train"].tokens)


def test_the_same_request_is_answered_by_what_is_there(tmp_path: Path, tokenizer: Any) -> None:
    source, output = corpus(tmp_path, 20), tmp_path / "deep" / "out"
    request: dict[str, Any] = {"kind": "pretrain", "validation_fraction": 0.1}
    first = prepare([source], tokenizer, output, **request)
    times = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    moved = source.rename(tmp_path / "renamed.tsv")  # same content elsewhere
    moved.touch()
    assert prepare([moved], tokenizer, output, **request) == first
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == times


def test_another_request_is_refused(tmp_path: Path, tokenizer: Any, wide_tokenizer: Any) -> None:
    source, other, output = corpus(tmp_path, 20), corpus(tmp_path, 21, "b.tsv"), tmp_path / "out"
    prepare([source], tokenizer, output, kind="pretrain")
    before = content(output)
    requests: list[tuple[Any, Path, dict[str, Any], str]] = [
        (wide_tokenizer, source, {"kind": "pretrain"}, "tokenizer_digest ('[0-9a-f]*', now '"),
        (tokenizer, source, {"kind": "finetune"}, "kind ('pretrain', now 'finetune')"),
        (tokenizer, other, {"kind": "pretrain"}, "inputs;"),
        (tokenizer, source, {"kind": "pretrain", "validation": [other]}, "validation inputs;"),
    ]
    for a_tokenizer, path, options, words in requests:
        pattern = words.replace("(", r"\(").replace(")", r"\)")
        message = f"out was prepared with other {pattern}"
        with pytest.raises(DataError, match=message):
            prepare([path], a_tokenizer, output, **options)
    source.write_text(source.read_text("utf-8").replace("春", "秋"), "utf-8")
    with pytest.raises(DataError, match="prepared with other inputs; delete it or choose another"):
        prepare([source], tokenizer, output, kind="pretrain")
    assert content(output) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, tokenizer: Any) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="out exists and holds something else; choose another"):
        prepare([corpus(tmp_path, 2)], tokenizer, output, kind="pretrain")
    assert (output / "thesis.txt").read_text() == "years of work"


def test_an_empty_folder_is_filled(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "out").mkdir()
    assert not is_prepared(tmp_path / "out")
    prepare([corpus(tmp_path, 2)], tokenizer, tmp_path / "out", kind="pretrain")
    assert is_prepared(tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_left_of_a_failure(
    tmp_path: Path, tokenizer: Any, deadly_tokenizer: Any, workers: int
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "死"}\n' * 5000 + "no JSON\n", "utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 5001 is not JSON"):
        prepare([bad], tokenizer, tmp_path / "out", kind="pretrain", workers=workers)
    if workers > 1:
        with pytest.raises(GptMoeError, match="worker process ended with exit code 3"):
            prepare([bad], deadly_tokenizer, tmp_path / "out", kind="pretrain", workers=workers)
    assert list(tmp_path.iterdir()) == [bad]


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, tokenizer: Any) -> None:
    source = corpus(tmp_path, 2)
    with pytest.raises(DataError, match=r"a\.tsv/out cannot be written \(.*Not a directory"):
        prepare([source], tokenizer, source / "out", kind="pretrain")


def test_finetuning_lines_have_no_targets(make: Make) -> None:
    folder = make("a.txt", "春眠不觉晓\n处处闻啼鸟", kind="finetune")
    assert not Manifest.load(folder).has_targets
    assert isinstance(open_samples(folder, "train", 8, 0), LineSamples)
