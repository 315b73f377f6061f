"""What a caller shows: from options to the metadata of a call."""

from pathlib import Path

import pytest

from cluster import connection
from cluster.access import Access
from cluster.cli.access import access_of
from gptmoe.errors import ConfigError


def test_nothing_is_shown_to_an_open_server() -> None:
    access = access_of("", None, None)
    assert access == Access()
    assert not access.encrypted
    assert connection.metadata("", access) == ()


def test_options_become_access(tmp_path: Path) -> None:
    ca, cert, keys = (tmp_path / name for name in ("ca.pem", "me.pem", "keys"))
    for file in (ca, cert):
        file.touch()
    keys.write_text("# ours\n\nspring-wind operator\nriver-south\n")
    access = access_of(str(ca), cert, keys)
    assert access == Access(ca=ca, cert=cert, token="spring-wind")
    assert access.encrypted
    assert "spring-wind" not in repr(access)
    assert connection.metadata("poems", access) == (
        ("application", "poems"),
        ("authorization", "Bearer spring-wind"),
    )
    assert access_of("system", None, None) == Access(tls=True)


def test_files_that_are_missing_or_empty(tmp_path: Path) -> None:
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.write_text("# nothing\n")
    with pytest.raises(ConfigError, match=r"--ca .*missing is not a file"):
        access_of(str(missing), None, None)
    with pytest.raises(ConfigError, match=r"--cert .*missing is not a file"):
        access_of("", missing, None)
    with pytest.raises(ConfigError, match=r"--token-file .*missing is not a file"):
        access_of("", None, missing)
    with pytest.raises(ConfigError, match=r"--token-file .*empty holds no token"):
        access_of("", None, empty)
    empty.write_bytes("# 钥匙\nspring-wind".encode("gbk"))
    with pytest.raises(ConfigError, match=r"--token-file .*empty is not text in UTF-8; write the"):
        access_of("", None, empty)
