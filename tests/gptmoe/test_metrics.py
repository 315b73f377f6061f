"""gptmoe.metrics: the catalogue, and metrics.jsonl through crashes and resumes."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.errors import DataError
from gptmoe.metrics import CATALOGUE, JsonlRecorder, cut_after, read


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def write(path: Path, last_step: int) -> None:
    with JsonlRecorder(path) as recorder:
        for step in range(1, last_step + 1):
            recorder.record(step, loss=1 / step)


def test_one_object_a_line_and_steps_come_first(path: Path) -> None:
    with JsonlRecorder(path) as recorder:
        recorder.record(1, loss=0.5, expert_load=[3, 5])
        recorder.record(1, val_loss=0.25)
    assert path.read_text() == (
        '{"step": 1, "loss": 0.5, "expert_load": [3, 5]}\n{"step": 1, "val_loss": 0.25}\n'
    )


def test_a_line_can_be_read_while_the_run_goes_on(path: Path) -> None:
    with JsonlRecorder(path) as recorder:
        recorder.record(1, loss=0.5)
        assert read(path) == [{"step": 1, "loss": 0.5}]


def test_a_second_recorder_appends(path: Path) -> None:
    write(path, 1)
    with JsonlRecorder(path) as recorder:
        recorder.record(2, loss=0.5)
    assert [record["step"] for record in read(path)] == [1, 2]


@given(value=st.floats())
def test_numbers_keep_every_bit(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    path = tmp_path_factory.mktemp("precision") / "metrics.jsonl"
    with JsonlRecorder(path) as recorder:
        recorder.record(1, loss=value)
    found = read(path)[0]["loss"]
    assert found == value or (math.isnan(found) and math.isnan(value))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "learning_rat",
            "metric 'learning_rat' is not in the catalogue; did you mean learning_rate",
        ),
        ("xyzzy", "metric 'xyzzy' is not in the catalogue; declare it in gptmoe/metrics.py"),
    ],
)
def test_an_undeclared_name_is_refused_and_nothing_is_written(
    path: Path, name: str, message: str
) -> None:
    with JsonlRecorder(path) as recorder, pytest.raises(ValueError, match=message):
        recorder.record(1, loss=0.5, **{name: 1.0})
    assert not path.exists()


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_metric_says_what_it_is(name: str) -> None:
    assert CATALOGUE[name].name == name
    assert CATALOGUE[name].meaning
    for suffix, unit in (("_s", "s"), ("_bytes", "bytes"), ("tokens_per_s", "tokens/s")):
        if name.endswith(suffix):
            assert CATALOGUE[name].unit in (unit, "tokens/s")


def test_cut_after_drops_later_steps(path: Path) -> None:
    write(path, 5)
    with JsonlRecorder(path) as recorder:
        recorder.record(3, val_loss=0.5)
    cut_after(path, 3)
    assert [record["step"] for record in read(path)] == [1, 2, 3, 3]


@pytest.mark.parametrize("size", range(1, 20))
def test_a_half_written_last_line_is_passed_over_and_cut(path: Path, size: int) -> None:
    write(path, 2)
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"step": 3, "loss": 0.25}\n'[:size])
    assert len(read(path)) == 2
    cut_after(path, 3)
    assert path.read_bytes() == whole


def test_a_line_that_lacks_only_its_newline_is_kept(path: Path) -> None:
    write(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    cut_after(path, 3)
    assert path.read_bytes() == whole


def test_cutting_leaves_kept_lines_as_they_were_and_no_other_file(path: Path) -> None:
    write(path, 50)
    lines = path.read_text().splitlines()
    cut_after(path, 20)
    assert path.read_text().splitlines() == lines[:20]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_missing_file_holds_no_records_and_is_not_made(path: Path) -> None:
    assert read(path) == []
    cut_after(path, 3)
    assert not path.exists()


@pytest.mark.parametrize("line", ["not json", "[1]", json.dumps({"loss": 1.0})])
def test_a_broken_line_in_the_middle_is_named(path: Path, line: str) -> None:
    write(path, 1)
    with path.open("a") as file:
        file.write(line + "\n")
    write(path, 1)
    with pytest.raises(DataError, match="line 2 is not a JSON object with a step; remove"):
        read(path)
