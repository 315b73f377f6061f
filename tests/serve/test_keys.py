"""Bearer tokens from a file."""

import logging
import os
from pathlib import Path

import pytest

from gptmoe.errors import ConfigError, PermissionDenied, Unauthenticated
from serve.keys import Keys, first_token


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("# ours\nspring-wind\n\n  river-south  \n")
    file.chmod(0o600)
    return file


def replace(file: Path, text: str) -> None:
    """As operators should: a new file takes the old one's place."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.chmod(0o600)
    os.replace(new, file)


def opens(keys: Keys, token: str) -> bool:
    try:
        keys.check(f"Bearer {token}")
    except Unauthenticated:
        return False
    return True


def test_every_token_of_the_file_opens(file: Path) -> None:
    keys = Keys(file)
    assert opens(keys, "spring-wind")
    assert opens(keys, "river-south")
    keys.check("bearer spring-wind")
    assert not opens(keys, "# ours")
    assert not opens(keys, "")
    assert first_token(file) == "spring-wind"


@pytest.mark.parametrize(
    ("authorization", "sentence"),
    [
        (None, "a key is wanted and none came; send the header authorization: Bearer TOKEN"),
        ("", "a key is wanted"),
        ("Basic c3ByaW5nOndpbmQ=", "must be Bearer and a token"),
        ("Bearer spring-win", "the key is not one of this server's"),
        ("Bearer spring-wind2", "the key is not one of this server's"),
        ("Bearer 春风\udcff", "the key is not one of this server's"),
        ("Bearer", "must be Bearer and a token"),
    ],
)
def test_what_does_not_open(file: Path, authorization: str | None, sentence: str) -> None:
    with pytest.raises(Unauthenticated, match=sentence) as error:
        Keys(file).check(authorization)
    assert "spring-win" not in str(error.value), "a sentence never repeats a token"


def test_a_new_file_takes_effect_without_a_restart(file: Path) -> None:
    keys = Keys(file)
    replace(file, "autumn-moon\n")
    assert opens(keys, "autumn-moon")
    assert not opens(keys, "spring-wind")


def test_only_an_operators_key_operates(file: Path) -> None:
    keys = Keys(file)
    sentence = "^Drain wants an operator's key, and this one may only generate and look; show one"
    with pytest.raises(PermissionDenied, match=sentence):
        keys.check("Bearer spring-wind", operation="Drain")
    with pytest.raises(Unauthenticated):
        keys.check("Bearer autumn-moon", operation="Drain")
    replace(file, "autumn-moon operator\nspring-wind\n")
    keys.check("Bearer autumn-moon", operation="Drain")
    keys.check("Bearer autumn-moon")
    keys.check("Bearer spring-wind")
    assert first_token(file) == "autumn-moon"
    for token in ("autumn-moon operator", "operator"):
        assert not opens(keys, token)
    with pytest.raises(PermissionDenied):
        keys.check("Bearer spring-wind", operation="Drain")


@pytest.mark.parametrize("text", ["", "# none\n", "two words\n", "a operator b\n", "春风\n"])
def test_a_spoilt_file_leaves_the_last_good_tokens(
    file: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys = Keys(file)
    replace(file, text)
    for _ in range(3):
        assert opens(keys, "spring-wind")
        assert not opens(keys, "two")
    (record,) = caplog.records
    assert "keys stay as they were" in record.getMessage()
    replace(file, "autumn-moon\n")
    assert opens(keys, "autumn-moon")


def test_a_file_that_is_gone_leaves_the_last_good_tokens(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = Keys(file)
    file.unlink()
    for _ in range(3):
        assert opens(keys, "spring-wind")
    assert len(caplog.records) == 1
    file.write_text("autumn-moon\n")
    file.chmod(0o600)
    assert opens(keys, "autumn-moon")
    assert not opens(keys, "spring-wind")


def test_a_file_that_may_be_read_again_is_read_again(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, encoding: str) -> str:
        raise PermissionError(13, "Permission denied")

    keys = Keys(file)
    replace(file, "autumn-moon\n")
    with monkeypatch.context() as denied:
        denied.setattr(Path, "read_text", refuse)
        assert opens(keys, "spring-wind")
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # its clock counts milliseconds
        file.chmod(0o600)
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert opens(keys, "autumn-moon")
    assert not opens(keys, "spring-wind")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no token; write one a line"),
        ("# only this\n", "holds no token"),
        ("good\ntwo words\n", "line 2 of the keys file .* is no token"),
        ("good operators\n", "visible ASCII characters, and behind it operator or nothing"),
        ("春风\n", "line 1 of the keys file .* is no token"),
    ],
)
def test_a_file_without_tokens_is_refused_at_the_start(
    file: Path, text: str, sentence: str
) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=sentence) as error:
        Keys(file)
    assert "two words" not in str(error.value)


def test_a_file_that_cannot_be_read_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing cannot be read: No such file"):
        Keys(tmp_path / "missing")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        first_token(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        Keys(tmp_path / "binary")


def test_a_file_that_others_can_read_is_reported(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        Keys(file)
        assert not caplog.records
        file.chmod(0o644)
        Keys(file)
    (record,) = caplog.records
    assert "can be read by other users" in record.getMessage()
