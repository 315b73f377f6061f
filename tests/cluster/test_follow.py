"""A growing run is drawn: as a bar on a terminal, as lines elsewhere."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from cluster import follow, topology_file
from cluster.messages import Failure, Topology
from gptmoe.metrics import cut_after


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks that follow each other at once: what happens between them is in the script."""
    monkeypatch.setattr(follow, "POLL_S", 0.001)


def append(folder: Path, *records: dict[str, float]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def state(folder: Path, name: str, max_steps: int = 3) -> None:
    raw = {"state": name, "max_steps": max_steps, "dashboard_url": "http://here"}
    (folder / "state.json").write_text(json.dumps(raw))


def script(*events: Callable[[], None]) -> Callable[[], bool]:
    """An `is_over` that lets one event happen at each look."""
    left = list(events)

    def is_over() -> bool:
        if not left:
            return True
        left.pop(0)()
        return False

    return is_over


def a_run(folder: Path) -> Callable[[], bool]:
    return script(
        lambda: state(folder, "preparing", max_steps=0),
        lambda: state(folder, "running"),
        lambda: append(folder, {"step": 1, "loss": 3.25, "tokens_per_s": 1234.5}),
        lambda: append(folder, {"step": 2, "loss": 2.5}, {"step": 2, "val_loss": 2.75}),
        lambda: append(folder, {"step": 3, "loss": 2.0}),
        lambda: state(folder, "finished"),
    )


def drawn(folder: Path, *, terminal: bool) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100)
    follow.follow(folder, console, a_run(folder))
    return file.getvalue()


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    assert drawn(tmp_path, terminal=False).splitlines() == [
        "preparing http://here",
        "running http://here",
        "step 1  loss 3.2500  1,234 tokens/s",
        "step 2  validation loss 2.7500",
        "finished http://here",
    ]


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    text = drawn(tmp_path, terminal=True)
    assert "step 2  validation loss 2.7500" in text
    last = [line for line in text.splitlines() if "finished" in line][-1]
    assert "3/3" in last
    assert "loss 2.0000" in last


def test_what_an_earlier_run_left_is_not_drawn(tmp_path: Path) -> None:
    state(tmp_path, "failed")
    append(tmp_path, {"step": 1, "loss": 9.0})
    text = drawn(tmp_path, terminal=False)
    assert "failed" not in text
    assert "9.0" not in text


def test_the_tail_of_a_run_that_goes_on(tmp_path: Path) -> None:
    append(tmp_path, *({"step": step, "loss": 1.0} for step in range(1, 8)))
    tail = follow.Tail(tmp_path / "metrics.jsonl")
    assert list(tail.new()) == []
    cut_after(tmp_path / "metrics.jsonl", 5)
    assert list(tail.new()) == []
    append(tmp_path, {"step": 6, "loss": 0.5})
    assert list(tail.new()) == [{"step": 6, "loss": 0.5}]


def test_the_tail_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = follow.Tail(path)
    assert list(tail.new()) == []
    path.write_text('{"step": 1}\n{"st')
    assert list(tail.new()) == [{"step": 1}]
    with path.open("a") as file:
        file.write('ep": 2}\nbroken\n{"step": 3}\n')
    assert [record["step"] for record in tail.new()] == [2, 3]


@pytest.mark.parametrize("terminal", [False, True])
def test_what_fails_is_said_once(tmp_path: Path, terminal: bool) -> None:
    old = Failure(epoch=1, reason="an earlier run's worker was killed")
    new = Failure(epoch=2, reason="worker 1 was killed")
    warning = Failure(epoch=3, reason="the disk is full", goes_on=True)

    def failed(*failures: Failure) -> None:
        topology_file.write(tmp_path, Topology(epoch=3, run="a", failures=failures))

    failed(old)
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100)
    events = (
        lambda: state(tmp_path, "running"),
        lambda: failed(old, new),
        lambda: failed(old, new, warning),
        lambda: failed(old, new, warning),
    )
    follow.follow(tmp_path, console, script(*events))
    text = file.getvalue()
    assert "earlier run" not in text
    assert text.count("epoch 2 ended: worker 1 was killed") == 1
    assert text.count("the disk is full") == 1
