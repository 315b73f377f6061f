"""train.ledger: what was learned from, through restarts in other layouts."""

from pathlib import Path

import pytest

from gptmoe.errors import DataError
from tests.train.test_worker import file_size_limit
from train import ledger
from train.ledger import Ledger


def attempt(run_dir: Path, ranks: int, done: int, steps: range, batch: int = 8) -> None:
    """Each data rank takes its consecutive share of each step."""
    number, share = ledger.next_attempt(run_dir), batch // ranks
    for rank in range(ranks):
        pages = Ledger(run_dir, number, rank, done)
        for step in steps:
            pages.note(step, (step - 1) * batch + rank * share, share)


def test_a_run_that_was_lost_and_resized_took_each_sample_once(tmp_path: Path) -> None:
    attempt(tmp_path, 4, 0, range(1, 6))  # the checkpoint of step 3 is the newest
    attempt(tmp_path, 2, 3, range(4, 5))  # lost at once
    attempt(tmp_path, 1, 3, range(4, 8))
    steps = ledger.read(tmp_path)
    assert list(steps) == [1, 2, 3, 4, 5, 6, 7]
    assert steps[1] == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert steps[5] == [range(32, 40)]
    ledger.check(steps, 8)


def test_a_full_disk_tears_no_page(tmp_path: Path) -> None:
    page = Ledger(tmp_path, 1, 0, 0)
    with file_size_limit(30):
        for step in (1, 2):
            page.note(step, (step - 1) * 8, 8)
        assert list(ledger.read(tmp_path)) == []
    page.close()
    ledger.check(ledger.read(tmp_path), 8)
    assert list(ledger.read(tmp_path)) == [1, 2]


def test_half_a_line_is_a_step_that_was_not_taken(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 0, range(1, 4))
    page = tmp_path / "ledger" / "00001-00000.jsonl"
    page.write_text(page.read_text()[:-5])
    assert list(ledger.read(tmp_path)) == [1, 2]


def test_an_attempt_that_was_killed_at_its_first_line_has_taken_no_step(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 0, range(1, 4))
    (tmp_path / "ledger" / "00002-00000.jsonl").write_text('{"do')
    (tmp_path / "ledger" / "00002-00001.jsonl").write_text("")
    assert list(ledger.read(tmp_path)) == [1, 2, 3]
    assert ledger.next_attempt(tmp_path) == 3


def test_a_run_proves_what_it_has_learned_from(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ledger.main([str(trained)]) == 0
    out = capsys.readouterr().out
    assert out == "2 steps have learned from the samples 0 to 31, from each of them once\n"
    page = trained / "ledger" / "00001-00000.jsonl"
    page.write_text("".join(page.read_text().splitlines(keepends=True)[:-1]))
    assert ledger.main([str(trained)]) == 2
    assert "holds 1 steps, its newest checkpoint has taken 2" in capsys.readouterr().err


def test_repeated_and_missing_samples_are_found(tmp_path: Path) -> None:
    attempt(tmp_path, 2, 0, range(1, 3))
    steps = ledger.read(tmp_path)
    with pytest.raises(DataError, match="step 2 of the ledger holds the samples"):
        ledger.check({1: steps[1], 2: steps[1]}, 8)
    with pytest.raises(DataError, match="takes 8 to 15, each once"):
        ledger.check({1: steps[1], 2: steps[2][:1]}, 8)
    with pytest.raises(DataError, match="but step 1 takes 0 to 7"):
        ledger.check({2: steps[2]}, 8)
