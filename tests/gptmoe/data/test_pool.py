"""The ordered map over processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptmoe.data.pool import ordered_map
from gptmoe.errors import DataError, GptMoeError


def slow_square(number: int) -> int:
    time.sleep(0.02 if number % 3 == 0 else 0)
    return number * number


def refuse(number: int) -> int:
    raise DataError(f"not {number}")


def die(number: int) -> int:
    os._exit(number)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_come_in_order_and_items_are_read_only_a_little_ahead(workers: int) -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    results = ordered_map(slow_square, items(), workers)
    assert [next(results), next(results)] == [0, 1]
    assert len(taken) <= 2 * workers + 2
    assert list(results) == [n * n for n in range(2, 20)]


def test_fewer_items_than_workers() -> None:
    assert list(ordered_map(slow_square, [3], 2)) == [9]


def test_large_items_and_results_do_not_block() -> None:
    big = [bytes([n]) * 3_000_000 for n in range(6)]
    assert list(ordered_map(bytes.upper, big, 2)) == big


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_of_the_function_is_raised_here(workers: int) -> None:
    with pytest.raises(DataError, match="not 7"):
        list(ordered_map(refuse, [7, 8], workers))


def test_a_process_that_dies_is_reported_with_its_code() -> None:
    with pytest.raises(GptMoeError, match=r"exit code 3; if memory ran out \(-9\) use fewer"):
        list(ordered_map(die, [3, 3, 3], 2))


SCRIPT = """
import sys, time
from gptmoe.data.pool import ordered_map
{guard}
    print("started", flush=True)
    for _ in ordered_map({function}, [{item}] * 9, 2):
        pass
"""


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(guard="if True:", function="abs", item="1"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "guard that script with `if __name__" in done.stderr


def test_an_interrupt_ends_all_processes_and_only_the_caller_reports_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    guard = 'if __name__ == "__main__":'
    script.write_text(SCRIPT.format(guard=guard, function="time.sleep", item="60"))
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")
    deadline = time.monotonic() + 10  # multiprocessing's own helper needs a moment
    while group_is_alive(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
