"""python -m train with what it cannot use: exit code 2, one sentence, and state.json says so."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptmoe import metrics
from tests.train.alone import run_alone
from tests.train.conftest import SMALL, TINY, Configure
from train.__main__ import main
from train.plan import make_plan
from train.state import claimed

TINY_TEXT = TINY.read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


CONFIGS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "a.toml does not exist; configs/ holds examples"),
    "empty": (b"", "key run is missing; add it to the file"),
    "not UTF-8": (b"\xff\xfe[run]", "a.toml is not UTF-8 text"),
    "not TOML": (b"run: {dir: runs/a}", "a.toml is not valid TOML"),
    "a number as a table": (
        TINY_TEXT.replace("[schedule]", "[extra]").replace("[run]", "schedule = 3\n[run]").encode(),
        "schedule is a table of keys, found 3; write schedule.NAME=VALUE",
    ),
}
"""What may stand in place of a config, and what is said about it."""


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    content, message = CONFIGS[case]
    if content is not None:
        (tmp_path / "a.toml").write_bytes(content)
    assert main(["pretrain", str(tmp_path / "a.toml")]) == 2
    assert_one_sentence(capsys.readouterr().err, message)


def test_a_config_that_is_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", str(tmp_path)]) == 2
    assert_one_sentence(capsys.readouterr().err, "is a folder; name a .toml file")


WORDS: dict[str, tuple[str, str]] = {
    "an unknown key": ("train.max_stepz=3", "unknown config key train.max_stepz; did you mean tra"),
    "an unknown table": ("modl.d_ff=3", "unknown config key modl; did you mean model?"),
    "a wrong type": ("train.max_steps=many", "train.max_steps must be a whole number, found 'many"),
    "a word without a key": ("=3", "override '=3' is not of the form key=value"),
    "a value out of range": ("checkpoint.keep=0", "checkpoint.keep=0 must be at least 1"),
}
"""A word on the command line, and what is said about it."""


@pytest.mark.parametrize("case", WORDS)
def test_a_word_that_means_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    word, message = WORDS[case]
    assert main(["pretrain", str(TINY), f"run.dir={tmp_path / 'run'}", word]) == 2
    assert_one_sentence(capsys.readouterr().err, message)
    assert not (tmp_path / "run").exists()


BROKEN: dict[str, tuple[str, tuple[str, bytes], str]] = {
    "ep that does not divide the experts": (
        "pretrain parallel.ep=8 train.batch_tokens=512",
        ("", b""),
        "parallel.ep=8 must divide num_experts=12; use 1, 2, 3, 4, 6 or 12",
    ),
    "a corpus that is not there": (
        "pretrain data.path=TMP/none.txt",
        ("", b""),
        "none.txt does not exist; check the path",
    ),
    "an empty corpus": (
        "pretrain data.path=TMP/a.txt",
        ("a.txt", b""),
        "a.txt is empty; give a file with text or leave it out",
    ),
    "a blank corpus": ("pretrain data.path=TMP/a.txt", ("a.txt", b" \n \n"), "a.txt holds no text"),
    "a line that is not UTF-8": (
        "pretrain data.path=TMP/a.txt",
        ("a.txt", "春".encode() + b"\n\xff\n"),
        "a.txt, line 2",
    ),
    "a line that is not JSON": (
        "finetune data.path=TMP/a.jsonl",
        ("a.jsonl", b'{"src_txt": "a"}\n{"src_t'),
        "a.jsonl, line 2",
    ),
    "a missing column": (
        "finetune data.path=TMP/a.jsonl",
        ("a.jsonl", b'{"text1": "a"}\n'),
        "src_txt",
    ),
    "an unknown suffix": (
        "pretrain data.path=TMP/a.docx",
        ("a.docx", b"a"),
        "a.docx has an unknown suffix",
    ),
    "a tokenizer that is not there": (
        "pretrain data.tokenizer=TMP/none.json",
        ("", b""),
        "none.json",
    ),
    "a tokenizer that is none": (
        "pretrain data.tokenizer=TMP/tokenizer.json",
        ("tokenizer.json", b"{}"),
        "tokenizer.json",
    ),
    "a checkpoint that is not there": (
        "finetune model.checkpoint=TMP/none",
        ("", b""),
        "none is not a folder; name a checkpoint, a run's folder",
    ),
    "nothing to train on": (
        "pretrain data.path=TMP/a.txt data.validation_fraction=1.0",
        ("a.txt", b"a"),
        "data.validation_fraction=1.0 must be at least 0 and below 1",
    ),
}
"""Words that make a run impossible, a file that they name, and what is said about it."""


@pytest.mark.parametrize("case", BROKEN)
def test_a_run_that_cannot_start_says_why_in_its_folder_too(
    tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    words, (name, content), message = BROKEN[case]
    if name:
        (tmp_path / name).write_bytes(content)
    kind, *overrides = words.replace("TMP", str(tmp_path)).split()
    run = tmp_path / "run"
    paths = [f"run.dir={run}", f"data.path={prepared}", "data.workers=0"]
    assert main([kind, str(TINY), *SMALL, *paths, *overrides]) == 2
    said = assert_one_sentence(capsys.readouterr().err, message)
    state = json.loads((run / "state.json").read_text(encoding="utf-8"))
    assert (state["state"], state["message"]) == ("failed", said)
    assert sorted(path.name for path in run.iterdir()) == [".lock", ".lock-writer", "state.json"]


def assert_one_sentence(stderr: str, message: str) -> str:
    """The last line, without its first word; nothing but log lines may stand before it."""
    *logged, last = stderr.splitlines()
    assert all(" | " in line for line in logged), stderr
    assert last.startswith("failed: ")
    assert message in last
    return last.removeprefix("failed: ")


def test_a_damaged_checkpoint_is_named(
    tmp_path: Path, trained: Path, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = next((trained / "checkpoints").glob("*/weights-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    words = [f"model.checkpoint={trained}", f"run.dir={tmp_path / 'tuned'}", "data.workers=0"]
    assert main(["finetune", str(TINY), *SMALL, *words]) == 2
    assert_one_sentence(capsys.readouterr().err, f"{shard.name} in {shard.parent} is damaged")


def test_the_command_itself_fails_without_a_traceback(tmp_path: Path) -> None:
    words = [str(TINY), f"run.dir={tmp_path / 'run'}", f"data.path={tmp_path / 'none.txt'}"]
    done = subprocess.run(
        [sys.executable, "-m", "train", "pretrain", *words], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"failed: {tmp_path / 'none.txt'} does not exist; check the path\n"


def test_a_run_that_is_complete_says_so_and_starts_nothing(
    trained: Path, prepared: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    before = metrics.read(trained / "metrics.jsonl")
    paths = [f"run.dir={trained}", f"data.path={prepared}", "train.max_steps=2"]
    with caplog.at_level("INFO"):
        assert main(["pretrain", str(TINY), *SMALL, *paths]) == 0
    assert f"{trained} is complete: 2 of 2 steps are done; raise train.max_steps" in caplog.text
    state = json.loads((trained / "state.json").read_text())
    assert (state["state"], state["max_steps"]) == ("finished", 2)
    assert state["cluster_address"] == ""
    assert metrics.read(trained / "metrics.jsonl") == before


def test_what_was_recorded_after_the_end_of_a_complete_run_goes(
    trained: Path, configure: Configure
) -> None:
    with (trained / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 9.9}\n')  # killed on its way to a later end
    words = [f"{name}={value}" for name, value in (("run.dir", trained), ("train.max_steps", 2))]
    assert main(["pretrain", str(TINY), *SMALL, *words, f"data.path={configure().data.path}"]) == 0
    assert metrics.read(trained / "metrics.jsonl")[-1]["step"] == 2


def test_a_second_run_in_the_same_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with claimed(tmp_path / "run") as state:
        state.write(state="running")
        assert main(["pretrain", str(TINY), f"run.dir={tmp_path / 'run'}"]) == 2
        assert_one_sentence(
            capsys.readouterr().err,
            f"process {os.getpid()} on {os.uname().nodename} is training in {tmp_path / 'run'}",
        )
        assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "running"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_while_data_is_prepared(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    text = tmp_path / "long.txt"
    text.write_text("春眠不觉晓，处处闻啼鸟。\n\n" * 90, encoding="utf-8")
    monkeypatch.setattr("train.state.StateFile.preparing", lambda *_: os.kill(os.getpid(), number))
    words = [f"run.dir={tmp_path / 'run'}", f"data.path={text}", "data.workers=0"]
    assert main(["pretrain", str(TINY), *words]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "interrupted: start the same command again to go on from the last checkpoint"
    )
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "interrupted"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".lock",
        ".lock-writer",
        "state.json",
    ]


def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert main(["pretrain", str(tmp_path / "none.toml")]) == 2
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_finished_run_shows_what_it_was(trained: Path, configure: Configure) -> None:
    shutil.rmtree(trained / "checkpoints")
    config = configure("train.max_steps=1")
    run_alone(make_plan("pretrain", config))
    paths = [f"run.dir={trained}", f"data.path={config.data.path}", "train.max_steps=1"]
    assert main(["pretrain", str(TINY), *SMALL, *paths, "data.workers=0"]) == 0
    shown = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    assert shown["train"]["train"]["max_steps"] == 1
    assert shown["model"]["d_model"] == 24
