"""Files to examples: every format, plain and compressed, and every way a file can be wrong."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptmoe.data import Example, Kind, find_files, read_examples
from gptmoe.data.reading import MAX_BLOCK_CHARACTERS
from gptmoe.errors import ConfigError, DataError

POEM = "空山新雨后，天气晚来秋。"
OTHER = "明月松间照，清泉石上流。"


def texts(file: Path, kind: Kind = "pretrain", **columns: str) -> list[str]:
    return [example.text for example in read(file, kind, **columns)]


def read(file: Path, kind: Kind = "pretrain", **columns: str) -> list[Example]:
    return list(read_examples(find_files([file]), kind, columns))


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix.lower() == ".gz" else data)
    return path


def write_json(path: Path, *rows: object) -> Path:
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_parquet(path: Path, **columns: list[object]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_text_file_is_blocks_for_pretraining_and_lines_for_finetuning(
    tmp_path: Path, suffix: str
) -> None:
    file = write(tmp_path / f"a.txt{suffix}", f"\n{POEM}\n{OTHER}\n\n \n{OTHER}")
    assert texts(file) == [f"{POEM}\n{OTHER}", OTHER]
    assert texts(file, "finetune") == [POEM, OTHER, OTHER]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_tsv_file_is_the_first_column_of_lines(tmp_path: Path, suffix: str, kind: Kind) -> None:
    file = write(tmp_path / f"a.tsv{suffix}", f"{POEM}\t王维\r\n\n{OTHER}\n")
    assert texts(file, kind) == [POEM, OTHER]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_json_lines_have_columns(tmp_path: Path, suffix: str) -> None:
    file = write_json(tmp_path / f"a.jsonl{suffix}", {"text": POEM, "id": 1}, {"text": OTHER})
    assert texts(file) == [POEM, OTHER]


def test_parquet_has_columns(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", text=[POEM, OTHER], id=[1, 2])
    assert texts(file) == [POEM, OTHER]


def test_targets_are_read_where_there_is_a_column(tmp_path: Path) -> None:
    lines = write_json(tmp_path / "a.jsonl", {"src_txt": POEM, "tgt_txt": OTHER})
    table = write_parquet(tmp_path / "a.parquet", src_txt=[POEM], tgt_txt=[OTHER])
    alone = write_parquet(tmp_path / "b.parquet", src_txt=[POEM])
    assert [(e.text, e.target) for e in read(lines, "finetune")] == [(POEM, OTHER)]
    assert [(e.text, e.target) for e in read(table, "finetune")] == [(POEM, OTHER)]
    assert [(e.text, e.target) for e in read(alone, "finetune")] == [(POEM, None)]


def test_columns_can_be_renamed(tmp_path: Path) -> None:
    lines = write_json(tmp_path / "a.jsonl", {"text1": POEM, "text2": OTHER})
    table = write_parquet(tmp_path / "a.parquet", text1=[POEM], text2=[OTHER])
    for file in (lines, table):
        assert texts(file, text="text2") == [OTHER]
        assert texts(file, "finetune", src_txt="text1") == [POEM]
        (pair,) = read(file, "finetune", src_txt="text1", tgt_txt="text2")
        assert (pair.text, pair.target) == (POEM, OTHER)


def test_only_a_line_feed_ends_a_line_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tsv", b"\xef\xbb\xbf" + f"{POEM}\u2028\x0b{OTHER}\n".encode())
    assert texts(file) == [f"{POEM}\u2028\x0b{OTHER}"]


def test_a_long_block_is_divided_at_the_end_of_a_line(tmp_path: Path) -> None:
    line = POEM * 5000
    file = write(tmp_path / "a.txt", f"{line}\n" * 40)
    blocks = texts(file)
    assert [block.count("\n") + 1 for block in blocks] == [17, 17, 6]
    assert all(len(block) < MAX_BLOCK_CHARACTERS + len(line) for block in blocks)
    assert "\n".join(blocks) == "\n".join([line] * 40)


def test_reading_is_lazy(tmp_path: Path) -> None:
    good = write(tmp_path / "a.tsv", f"{POEM}\n")
    bad = write(tmp_path / "b.jsonl", "no JSON")
    examples: Iterator[Example] = read_examples([good, bad], "finetune", {})
    assert next(examples).text == POEM
    with pytest.raises(DataError, match=r"b\.jsonl, line 1"):
        next(examples)


def test_how_much_is_read_rises_to_one(tmp_path: Path) -> None:
    long = write(tmp_path / "a.tsv", f"{POEM}\n" * 20_000)
    table = write_parquet(tmp_path / "a.parquet", text=[POEM, OTHER])
    done = [example.done for example in read(long)]
    assert done == sorted(done)
    assert 0 < done[0] < 0.1
    assert done[-1] == 1
    assert [example.done for example in read(table)] == [0.5, 1.0]


def test_inputs_may_be_files_folders_and_globs(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "deep" / ".cache").mkdir(parents=True)
    b, a = write(folder / "b.txt", "b"), write(folder / "deep" / "A.TSV.GZ", "a")
    for ignored in ("README.md", "_SUCCESS.txt", ".hidden.txt", "deep/.cache/c.txt"):
        write(folder / ignored, "no text")
    assert find_files([folder]) == [b, a]
    assert find_files([a, folder]) == [a, b]
    assert find_files([folder / "*.txt"]) == [folder / "_SUCCESS.txt", b]
    assert find_files([tmp_path / "corp*"]) == [b, a]
    assert texts(a) == ["a"]


def test_a_missing_or_useless_input_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "a.csv", "a")
    write(tmp_path / "empty.txt", "")
    for path, message in [
        ("nothing.txt", r"nothing\.txt does not exist"),
        ("*.jsonl", r"no file matches .*\*\.jsonl"),
        ("folder", r"folder .*folder holds no file ending in \.txt"),
        ("a.csv", r"a\.csv has an unknown suffix; .* one of \.txt"),
        ("empty.txt", r"empty\.txt is empty"),
    ]:
        with pytest.raises(DataError, match=message):
            find_files([tmp_path / path])
    with pytest.raises(DataError, match="no input was given"):
        find_files([])


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    file = write(tmp_path / "secret" / "a.txt", POEM)
    (tmp_path / "secret").chmod(0)
    me = os.geteuid()
    try:
        if me == 0:  # whom no permission stops
            os.seteuid(65534)
        with pytest.raises(DataError, match=r"a\.txt cannot be read: Permission denied"):
            find_files([file])
    finally:
        os.seteuid(me)
        (tmp_path / "secret").chmod(0o700)


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "a.parquet"):
        with pytest.raises(DataError, match=rf"{name} .*No such file"):
            list(read_examples([tmp_path / name], "pretrain", {}))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.tsv.gz"])
def test_a_file_of_blank_lines_is_named(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, "\n \n")
    with pytest.raises(DataError, match=rf"{name} holds no text"):
        read(file)


def test_a_table_without_rows_is_named(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", text=pa.array([], pa.string()))
    with pytest.raises(DataError, match=r"a\.parquet holds no text"):
        read(file)


@pytest.mark.parametrize("name", ["a.txt", "a.tsv", "a.jsonl", "a.jsonl.gz"])
def test_a_line_that_is_not_utf8_is_named(tmp_path: Path, name: str) -> None:
    line = json.dumps({"text": POEM}, ensure_ascii=False)
    file = write(tmp_path / name, f"{line}\n".encode() + line.encode("gb18030"))
    message = rf"{name}, line 2 is not UTF-8 \(byte 0x..\); convert .* iconv"
    with pytest.raises(DataError, match=message):
        read(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("1" * 5000, "line 2 is not JSON"),
        ('["a"]', r'line 2 is not a JSON object but \["a"\]'),
        (
            '{"src": "a", "id": 1}',
            r"line 2 has no column text, found src, id; .* data\.columns\.text",
        ),
        ("{}", "line 2 has no column text, found none"),
        ('{"text": null}', "line 2: column text must be text, found null"),
        ('{"text": ["a"]}', r'line 2: column text must be text, found \["a"\]'),
        (f'{{"text": {"1" * 50}}}', r"column text must be text, found 1{40}\.\.\."),
        ('{"text": "\\ud83d"}', r"line 2: column text holds half a surrogate pair \('\\ud83d'\)"),
    ],
)
def test_a_wrong_json_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(DataError, match=message):
        read(file)


def test_a_missing_column_of_a_table_is_named(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", text1=[POEM], id=[1])
    message = r"a\.parquet has no column src_txt, found text1, id; .*data\.columns\.src_txt=NAME"
    with pytest.raises(DataError, match=message):
        read(file, "finetune")
    with pytest.raises(DataError, match=r"has no column text2, .* data\.columns\.src_txt=NAME"):
        read(file, "finetune", src_txt="text2")
    with pytest.raises(DataError, match=r"row 1 has no column tgt, .* data\.columns\.tgt_txt=NAME"):
        read(file, "finetune", src_txt="text1", tgt_txt="tgt")


def test_a_column_of_numbers_is_named(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", text=[1])
    with pytest.raises(DataError, match=r"a\.parquet, row 1: column text must be text, found 1"):
        read(file)


def test_targets_in_some_rows_only_are_refused(tmp_path: Path) -> None:
    alone, pair = {"src_txt": POEM}, {"src_txt": POEM, "tgt_txt": OTHER}
    with pytest.raises(DataError, match="line 2 has column tgt_txt and the rows before have none"):
        read(write_json(tmp_path / "a.jsonl", alone, pair), "finetune")
    with pytest.raises(DataError, match="line 2 has no column tgt_txt, found src_txt"):
        read(write_json(tmp_path / "a.jsonl", pair, alone), "finetune")


@pytest.mark.parametrize(("kind", "known"), [("pretrain", "text"), ("finetune", "src_txt and .*")])
def test_an_unknown_renaming_is_named(tmp_path: Path, kind: Kind, known: str) -> None:
    file = write(tmp_path / "a.tsv", POEM)
    with pytest.raises(ConfigError, match=rf"data\.columns\.source .*use data\.columns\.{known}"):
        read(file, kind, source="a")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(os.urandom(1000).hex().encode() + b"\n" + os.urandom(1000).hex().encode())
    flipped = whole[:600] + bytes(byte ^ 255 for byte in whole[600:620]) + whole[620:]
    for data in (b"no gzip", whole[:-600], flipped, whole[:-8] + b"\0" * 8):
        (tmp_path / "a.txt.gz").write_bytes(data)
        with pytest.raises(DataError, match=r"a\.txt\.gz is not a sound gzip file \(after line"):
            read(tmp_path / "a.txt.gz")
    table = write_parquet(
        tmp_path / "whole.parquet", text=[os.urandom(99).hex() for _ in range(99)]
    )
    middle = bytearray(table.read_bytes())
    middle[20:200] = b"\xff" * 180
    for data in (b"no table", table.read_bytes()[:-20], bytes(middle)):
        (tmp_path / "a.parquet").write_bytes(data)
        with pytest.raises(
            DataError, match=r"a\.parquet is not a sound Parquet file \(after row 0"
        ):
            read(tmp_path / "a.parquet")
