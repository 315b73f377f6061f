import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptmoe.errors import DataError
from gptmoe.text import Tokenizer, load_tokenizer

Content = dict[str, Any]


def without(token: str) -> Callable[[Content], object]:
    def remove(content: Content) -> None:
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != token]
        content["model"]["vocab"].pop(token)

    return remove


def rewrite(folder: Path, change: Callable[[Content], object]) -> Path:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"absent does not exist; give a folder with tokenizer\.json"
    ):
        load_tokenizer(tmp_path / "absent")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"holds no tokenizer; it needs .* vocab\.json with merges\.txt"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04\xff", "is not UTF-8 text"),
        (b"not json", "is not JSON: Expecting value"),
        (b"", "is not JSON: Expecting value"),
        (b"[1, 2]", "holds no byte-pair vocabulary"),
        (b'{"model": {"type": "WordPiece", "vocab": {}}}', "holds no byte-pair vocabulary"),
        (b'{"added_tokens": [], "model": {"vocab": {}, "merges": []}}', "lacks the token"),
    ],
)
def test_a_file_that_is_no_tokenizer(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"tokenizer\.json {message}"):
        load_tokenizer(path)


def test_a_file_that_cannot_be_read() -> None:
    with pytest.raises(DataError, match="cannot read /proc/self/mem"):
        load_tokenizer("/proc/self/mem")


@pytest.mark.parametrize("token", ["<|endoftext|>", "<sep>", "\n"])
def test_a_file_without_a_named_token(token: str, chinese_folder: Path) -> None:
    path = rewrite(chinese_folder, without(token))
    with pytest.raises(DataError) as caught:
        load_tokenizer(path)
    assert f"lacks the token {token!r}; take" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"]["vocab"].update({"春": 999}), "must number its 401 tokens from 0"),
        (lambda c: c["model"]["vocab"].update({"A": "x"}), "must number its 400 tokens from 0"),
        (
            lambda c: c["model"]["vocab"].update({"春": c["model"]["vocab"].pop("A")}),
            "lacks 1 (first 0x41)",
        ),
        (
            lambda c: c["model"]["vocab"].update({"春": 400}),
            "holds '春', which does not stand for bytes",
        ),
        (
            lambda c: c["model"]["merges"].append(["A", "春"]),
            "merges 'A' '春' to no token of its own",
        ),
        (lambda c: c["model"]["merges"].append("A A"), "merges 'A' 'A' to no token of its own"),
        (lambda c: c["model"]["merges"].append("AA"), "holds no byte-pair vocabulary"),
    ],
)
def test_a_broken_vocabulary(
    change: Callable[[Content], object], message: str, chinese_folder: Path
) -> None:
    path = rewrite(chinese_folder, change)
    with pytest.raises(DataError) as caught:
        load_tokenizer(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda c: c.update(normalizer={"type": "NFKC"}), "normalizer"),
        (lambda c: c.update(pre_tokenizer=None), "pre_tokenizer"),
        (lambda c: c["pre_tokenizer"].update(use_regex=True), "pre_tokenizer"),
        (lambda c: c["model"].update(dropout=0.1), "model"),
        (lambda c: c["added_tokens"][1].update(rstrip=True), "added_tokens"),
        (lambda c: c["added_tokens"].append({"id": 400, "content": "</s>"}), "added_tokens"),
    ],
)
def test_a_tokenizer_with_other_rules(
    change: Callable[[Content], object], part: str, chinese_folder: Path
) -> None:
    path = rewrite(chinese_folder, change)
    with pytest.raises(DataError, match=f"is not jiebabpe: its {part} would give a text other ids"):
        load_tokenizer(path)


def test_older_files_and_flags_without_effect_are_read(
    chinese: Tokenizer, chinese_folder: Path
) -> None:
    def age(content: Content) -> None:
        content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
        del content["model"]["byte_fallback"], content["model"]["dropout"], content["normalizer"]
        content["added_tokens"][2]["special"] = True
        content["truncation"] = None

    assert load_tokenizer(rewrite(chinese_folder, age)).digest == chinese.digest


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ("[]", "", "vocab.json must map each token to its id"),
        ("{", "", "vocab.json is not JSON"),
        ('{"a": 0}', "", "vocab.json lacks the token '<|endoftext|>'"),
        ('{"<|endoftext|>": 0}', "", "must hold all 256 bytes as tokens, lacks 256 (first 0x00)"),
        ("{}", "#version: 0.2\na b\nabc", "merges.txt line 3 must be two tokens, found 'abc'"),
        ("{}", "a b c", "merges.txt line 1 must be two tokens, found 'a b c'"),
    ],
)
def test_broken_gpt2_files(vocab: str, merges: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(vocab, encoding="utf-8")
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    assert message in str(caught.value)


def test_a_folder_that_cannot_be_written(chinese: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"cannot write .*tokenizer\.json: .*; choose another folder"
    ):
        chinese.save(tmp_path / "file")
