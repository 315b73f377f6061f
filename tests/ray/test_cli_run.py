"""gptmoe pretrain, attached: watched by gptmoe status, ended by gptmoe stop."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster import env, runs

CLI = [sys.executable, "-m", "cluster.cli"]


def gptmoe(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *words], cwd=env.ROOT, capture_output=True, text=True, timeout=60)


def start(run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    """A run that does not end by itself, after its first steps."""
    words = ["pretrain", "configs/train/tiny.toml", f"run.dir={run_dir}", "train.max_steps=100000"]
    process = subprocess.Popen(
        [*CLI, *words, *overrides],
        cwd=env.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline_s = time.monotonic() + 180
    while not runs.newest_metrics(run_dir):
        if process.poll() is not None or time.monotonic() > deadline_s:
            process.kill()
            raise AssertionError(process.communicate()[1])
        time.sleep(0.2)
    return process


def test_a_run_is_watched_and_stopped_from_another_terminal(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with start(run_dir, "parallel.ep=2") as process:
        status = json.loads(gptmoe("status", str(run_dir), "--json").stdout)
        assert (status["state"], status["alive"], status["max_steps"]) == ("running", True, 100000)
        owners = status["topology"]["owners"]
        assert [owner["shard"]["experts"][0] for owner in owners] == [
            {"layer": 1, "first": 0, "end": 6},
            {"layer": 1, "first": 6, "end": 12},
        ]
        assert max(owner["heartbeat_age_s"] for owner in owners) < 15

        done = gptmoe("stop", str(run_dir))
        assert (done.returncode, done.stdout) == (0, f"{run_dir}: stopping\n")
        out, err = process.communicate(timeout=90)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert "loss" in err
    assert runs.read_state(run_dir).state == "interrupted"

    done = gptmoe("stop", str(run_dir))
    assert (done.returncode, done.stderr) == (
        2,
        f"error: the run in {run_dir} has ended already: it is interrupted\n",
    )
    done = gptmoe("logs", str(run_dir))
    assert done.returncode == 2
    assert "it printed to the terminal it was started in" in done.stderr


def test_ctrl_c_ends_the_run_and_the_command(tmp_path: Path) -> None:
    with start(tmp_path / "run") as process:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=90)
    assert process.returncode == 130
    assert runs.read_state(tmp_path / "run").state == "interrupted"
