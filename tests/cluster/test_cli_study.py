"""gptmoe study routers from outside: what it prints, and what it refuses before anything runs."""

import json
import subprocess
import sys
from pathlib import Path

from cluster import env


def study(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", "study", "routers", *words],
        cwd=env.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_dry_run_prints_what_each_arm_costs(tmp_path: Path) -> None:
    words = ("configs/study/small.toml", f"study.dir={tmp_path / 'study'}", "--dry-run", "--json")
    done = study(*words)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [arm["name"] for arm in facts["arms"]] == [
        "dense", "switch-8", "s_base-8", "expert_choice-8",
    ]  # fmt: skip
    assert all(abs(arm["against_reference"] - 1) < 0.02 for arm in facts["arms"])
    assert facts["tokens"] == 4 * 3 * 1500 * 2048
    assert not (tmp_path / "study").exists()


def test_a_wrong_arm_is_one_sentence() -> None:
    done = study("configs/study/tiny.toml", 'study.arms=["dense","hash"]')
    assert done.returncode == 2
    assert "study.arms names 'hash', which is no arm; known arms: dense, dense_2x," in done.stderr
    assert "Traceback" not in done.stderr


def test_a_corpus_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    words = (f"study.dir={tmp_path / 'study'}", "--data", str(tmp_path / "poems.tsv"))
    done = study("configs/study/tiny.toml", *words)
    assert done.returncode == 2
    assert f"{tmp_path / 'poems.tsv'} does not exist; check the path" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_time_is_refused() -> None:
    done = study("configs/study/tiny.toml", "--minutes", "0")
    assert done.returncode == 2
    assert "--minutes 0 must be above 0" in done.stderr
