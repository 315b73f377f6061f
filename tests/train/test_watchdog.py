"""train.watchdog: who hangs is ended and told, who waits is given more time."""

import logging
import threading
import time

import pytest
import torch.distributed as dist

from train.watchdog import Watchdog


class Clock:
    """Time that passes when told to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def ended(watchdog: Watchdog, ends: list[bool]) -> bool:
    watchdog.look()
    return bool(ends)


def test_no_progress_ends_the_process_and_says_where_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, ends = Clock(), list[bool]()
    watchdog = Watchdog("train-1", 10.0, lambda: ends.append(True), clock)
    clock.now_s = 9.0
    assert not ended(watchdog, ends)
    watchdog.progress()
    clock.now_s = 18.0
    assert not ended(watchdog, ends)
    clock.now_s = 20.0
    with caplog.at_level(logging.ERROR):
        assert ended(watchdog, ends)
    assert "worker train-1 hangs: no progress for 11 s" in caplog.text
    assert "test_no_progress_ends_the_process" in caplog.text


def test_who_waits_in_a_collective_has_twice_the_time() -> None:
    release = threading.Event()
    clock, ends, made = Clock(), list[bool](), list[Watchdog]()

    def wait_for_others() -> None:
        made.append(Watchdog("train-0", 10.0, lambda: ends.append(True), clock))
        release.wait(10)

    # a frame whose file lies in torch/distributed, without a group of ranks
    code = compile("def run(f):\n    f()\n", f"{dist.__path__[0]}/c10d.py", "exec")
    space: dict[str, object] = {}
    exec(code, space)
    thread = threading.Thread(target=space["run"], args=(wait_for_others,))
    thread.start()
    while not made:
        time.sleep(0.01)
    clock.now_s = 19.0
    assert not ended(made[0], ends)
    clock.now_s = 21.0
    assert ended(made[0], ends)
    release.set()
    thread.join()


def test_a_thread_looks_now_and_then_until_the_block_ends() -> None:
    ends = threading.Event()
    with Watchdog("train-0", 0.2, ends.set):
        assert ends.wait(5)
    off = threading.Event()
    with Watchdog("train-0", 0.0, off.set):
        time.sleep(0.05)
    assert not off.is_set()
