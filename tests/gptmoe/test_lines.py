"""gptmoe.lines: a full disk costs a warning and no line."""

from pathlib import Path

import pytest

from gptmoe.lines import LineFile
from tests.train.test_worker import file_size_limit


def test_lines_that_find_no_room_are_written_when_there_is_some(tmp_path: Path) -> None:
    warnings: list[str] = []
    file = LineFile(tmp_path / "lines", warnings.append)
    file.append("eins")
    with file_size_limit(8):
        file.append("zwei")
        file.append("三")
        assert (tmp_path / "lines").read_text() == "eins\nzwe"
    file.append("vier")
    assert (tmp_path / "lines").read_text() == "eins\nzwei\n三\nvier\n"
    assert warnings == [f"{tmp_path / 'lines'} is not written, File too large: lines wait for room"]


def test_closing_writes_what_waits(tmp_path: Path) -> None:
    warnings: list[str] = []
    file = LineFile(tmp_path / "lines", warnings.append)
    with file_size_limit(1):
        file.append("eins")
    file.close()
    assert (tmp_path / "lines").read_text() == "eins\n"


def test_what_is_no_want_of_room_is_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LineFile(tmp_path / "nowhere" / "lines").append("eins")
