"""What real faults cost a run of two workers: nothing. It ends as if they had not happened."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import env, runs, topology_file
from gptmoe import metrics
from gptmoe.checkpoint import latest
from gptmoe.config import load
from tests.ranks.pool import RankPool
from tests.ray.command import WITHIN_S, Command, losses, newest_step
from tests.train.alone import run_rank
from train import ledger
from train.config import TrainConfig
from train.plan import make_plan

TINY = env.ROOT / "configs" / "train" / "tiny.toml"
STEPS = 40
BATCH_SEQUENCES = 48
WORDS = (
    "parallel.ep=2",
    f"train.max_steps={STEPS}",
    "train.validate_every_steps=0",
    "checkpoint.every_steps=5",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[float, float]:
    """The losses of the run that nothing happens to, without Ray, in the same layout."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    config = load(TrainConfig, TINY, [*WORDS, f"run.dir={folder}", "data.workers=0"])
    plan = make_plan("pretrain", config)
    with RankPool(2) as pool:
        records, _ = pool.run(2, run_rank, plan, limit_s=WITHIN_S)
    return losses(records)


def start(folder: Path, *words: str, **variables: str) -> Command:
    run = ["pretrain", str(TINY), *WORDS, f"run.dir={folder / 'run'}", *words]
    return Command(folder, *run, **variables)


def pid_of(run_dir: Path, worker: str) -> int:
    topology = topology_file.read(run_dir)
    assert topology is not None
    return next(owner.pid for owner in topology.owners if owner.worker == worker)


def assert_nothing_was_lost(run_dir: Path, whole: dict[float, float]) -> None:
    assert losses(metrics.read(run_dir / "metrics.jsonl")) == whole  # to the last bit
    steps = ledger.read(run_dir)
    assert list(steps) == list(range(1, STEPS + 1))
    ledger.check(steps, BATCH_SEQUENCES)


def freeze(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("fault", "worker", "reason"),
    [
        (kill, "train-1", "the process of worker 1 was killed or its node was lost"),
        (kill, "train-0", "the process of worker 0 was killed or its node was lost"),
        (
            freeze,
            "train-1",
            "the process of worker 1 does not answer: it hangs, or its node is lost",
        ),
    ],
)
def test_a_lost_worker_is_replaced_and_named(
    tmp_path: Path,
    whole: dict[float, float],
    fault: Callable[[int], None],
    worker: str,
    reason: str,
) -> None:
    run_dir = tmp_path / "run"
    command = start(tmp_path, RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S="6")
    command.wait_until(lambda: newest_step(run_dir) > 11)
    pid = pid_of(run_dir, worker)
    epoch = topology_epoch(run_dir)
    fault(pid)
    command.wait_until(lambda: topology_epoch(run_dir) > epoch and newest_step(run_dir) > 11)
    ended = command.end()
    assert ended.code == 0, ended.stderr
    assert_nothing_was_lost(run_dir, whole)
    topology = topology_file.read(run_dir)
    assert topology is not None
    assert [(f.epoch, f.reason) for f in topology.failures] == [(epoch, reason)]
    assert not is_alive(pid)


def topology_epoch(run_dir: Path) -> int:
    topology = topology_file.read(run_dir)
    return topology.epoch if topology else 0


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_too_many_failures_end_the_run_with_a_sentence(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = start(tmp_path, "run.max_failures=0")
    command.wait_until(lambda: newest_step(run_dir) > 6)
    kill(pid_of(run_dir, "train-1"))
    ended = command.end()
    assert ended.code == 2
    assert ended.last_line == (
        "failed: training stopped, the process of worker 1 was killed or its node was lost; "
        "start the same command again to go on from the last checkpoint"
    )
    assert runs.read_state(run_dir).state == "failed"


def test_a_truncated_shard_is_named_and_the_checkpoint_before_it_is_used(
    tmp_path: Path, whole: dict[float, float]
) -> None:
    run_dir = tmp_path / "run"
    command = start(tmp_path)
    command.wait_until(lambda: newest_step(run_dir) > 16)
    workers = [pid_of(run_dir, name) for name in ("train-0", "train-1")]
    command.end(signal.SIGKILL)
    while any(is_alive(pid) for pid in workers):  # for seconds, and may save meanwhile
        time.sleep(0.1)
    newest = latest(run_dir)
    shard = newest / "weights-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    ended = start(tmp_path).end()
    assert ended.code == 0, ended.stderr
    assert shard.name in ended.stderr
    assert newest.name in ended.stderr
    assert_nothing_was_lost(run_dir, whole)


def test_training_goes_on_while_a_disk_is_full(tmp_path: Path, whole: dict[float, float]) -> None:
    """One worker's files may not grow for a while: the old checkpoint stays, and new ones follow.

    To the program the limit is an error of its writes, as a full disk is.
    """
    run_dir = tmp_path / "run"
    command = start(tmp_path)
    command.wait_until(lambda: saved_step(run_dir) > 0)
    pid, full_at = pid_of(run_dir, "train-1"), newest_step(run_dir)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    command.wait_until(lambda: newest_step(run_dir) > full_at + 12)
    assert 0 < saved_step(run_dir) <= full_at + 5  # one may have been under way
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ended = command.end()
    assert ended.code == 0, ended.stderr
    topology = topology_file.read(run_dir)
    assert topology is not None
    assert topology.epoch == 1
    assert all(failure.goes_on for failure in topology.failures)
    (words,) = {failure.reason.partition(":")[0] for failure in topology.failures}
    assert words == "TRAINING GOES ON WITHOUT A NEW CHECKPOINT"
    assert saved_step(run_dir) == STEPS
    assert_nothing_was_lost(run_dir, whole)


def saved_step(run_dir: Path) -> int:
    """Of the newest complete checkpoint; 0 = there is none."""
    saved = (run_dir / "checkpoints").glob("step-*/manifest.json")
    return max((int(path.parent.name.rpartition("-")[2]) for path in saved), default=0)


def test_a_slow_worker_is_named_and_all_start_again(
    tmp_path: Path, whole: dict[float, float]
) -> None:
    """One worker shares a core with other programs until it is noticed; nothing is done twice."""
    run_dir = tmp_path / "run"
    command = start(tmp_path, "run.slow_s=4", "checkpoint.every_steps=0")
    command.wait_until(lambda: newest_step(run_dir) > 2)
    pid, epoch = pid_of(run_dir, "train-1"), topology_epoch(run_dir)
    for task in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(task), {0})
    spin = [sys.executable, "-c", "while True: pass"]
    hogs = [subprocess.Popen(spin, start_new_session=True) for _ in range(6)]
    try:
        for hog in hogs:
            os.sched_setaffinity(hog.pid, {0})
        command.wait_until(lambda: topology_epoch(run_dir) > epoch)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    ended = command.end()
    assert ended.code == 0, ended.stderr
    assert_nothing_was_lost(run_dir, whole)
    topology = topology_file.read(run_dir)
    assert topology is not None
    (failure,) = topology.failures
    assert re.fullmatch(
        r"worker 1 is slow: for 4 s its products have taken [\d.]+ times as long as the others'; "
        r"all was saved at step \d+",
        failure.reason,
    )
