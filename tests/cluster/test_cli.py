"""The gptmoe command from outside: quick, helpful, and one sentence for a wrong input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest

from cluster import env
from protos import control_pb2

from .conftest import ControlServer, Run

COMMANDS = (
    ["models"],
    ["tokenizer", "train"],
    ["data", "prepare"],
    ["plan"],
    ["pretrain"],
    ["finetune"],
    ["study", "routers"],
    ["generate"],
    ["evaluate"],
    ["import"],
    ["score"],
    ["tokenize"],
    ["abort"],
    ["serve"],
    ["scale"],
    ["drain"],
    ["refresh"],
    ["submit"],
    ["status"],
    ["logs"],
    ["stop"],
)
CLI = [sys.executable, "-m", "cluster.cli"]
TINY = "configs/train/tiny.toml"


def gptmoe(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *words], cwd=env.ROOT, capture_output=True, text=True, timeout=120)


def test_help_and_models_import_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['gptmoe', *sys.argv[1:]]\n"
        "from cluster.cli.main import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'ray', 'pyarrow', 'grpc', 'jieba'} & set(sys.modules)))"
    )
    for words in (["--help"], ["models", "--json"], ["generate", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=env.ROOT, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example_of_each_command(run: Run, command: Sequence[str]) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert f"  gptmoe {' '.join(command)} " in out.partition("Examples:")[2] + " "


def test_models_as_json(run: Run) -> None:
    facts = {row["name"]: row for row in json.loads(run("models", "--json")[1])}
    found = facts["0.35B+MoE-64"]
    assert found.pop("parameters") == pytest.approx(6.70e9, rel=0.01)
    assert found.pop("active_parameters") == pytest.approx(0.36e9, rel=0.01)
    assert found == {
        "name": "0.35B+MoE-64",
        "num_layers": 24,
        "d_model": 1024,
        "num_heads": 16,
        "num_experts": 64,
        "learning_rate": 3e-4,
        "batch_tokens": 524288,
    }
    assert facts["base"]["num_experts"] == 0
    table = run("models")[1].splitlines()
    assert table[0].split()[:3] == ["name", "params", "active"]
    assert len(table) == len(facts) + 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretrian"], "Did you mean 'pretrain'?"),
        (["models", "--jsn"], "No such option: --jsn"),
        (["submit", "nothing"], "'nothing' is not one of"),
        (["scale", "0"], "greater than or equal to 1"),
        (["pretrain", "nope.toml"], "error: config file nope.toml does not exist"),
        (["pretrain", "run.dir=x"], "error: pretrain wants a config file, such as configs/train/t"),
        (["pretrain", TINY, "parallel.epp=2"], "error: unknown config key parallel.epp"),
        (["status", "/"], "error: / is not the folder of a run"),
        (["status", "runs", "--target", "x"], "error: status takes one of RUN_DIR, --address and"),
        (["scale", "2", "--target", "x", "--address", "y"], "error: scale takes one of"),
        (["status", "--target", "127.0.0.1:1"], "error: no server answers at 127.0.0.1:1"),
        (["drain"], "Missing option '--target'"),
        (["generate"], "error: generate wants a PROMPT or --input"),
        (["generate", "春"], "error: generate wants --checkpoint DIR or --target"),
        (["generate", "春", "--stream", "--json"], "error: --stream prints plain text"),
        (["generate", "春", "--max-new-tokens", "-1", "--target", "x"], "error: max_new_tokens"),
        (["generate", "春", "--target", "127.0.0.1:1"], "error: no server answers at 127.0.0.1:1"),
        (["stop", "configs"], "error: configs is not the folder of a run"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_wrong_input_is_one_sentence(run: Run, words: list[str], expected: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert expected in err


# These set the environment of Ray, which is for a process of their own.
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["serve"], "error: key checkpoint is missing"),
        (["status", "--address", "http://127.0.0.1:1"], "error: no Ray cluster answers at http"),
        (["stop", "a-job", "--address", "http://127.0.0.1:1"], "error: no Ray cluster answers"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_it_has_no_traceback_either(words: list[str], expected: str) -> None:
    done = gptmoe(*words)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_served_model_is_shown(run: Run, served_at: str) -> None:
    code, out, _ = run("status", "--target", served_at)
    assert code == 0
    assert out.startswith("poems: 1 replica, weights version 4\n")
    assert "75% 1/0" in out
    facts = json.loads(run("status", "--target", served_at, "--json")[1])
    assert (facts["application"], facts["topologies"][0]["owners"][1]["rank"]) == ("poems", 1)


def test_an_operators_commands(run: Run, served_at: str, control: ControlServer) -> None:
    at = ["--target", served_at]
    assert run("drain", *at) == (0, f"{served_at} takes no new requests\n", "")
    assert run("drain", *at, "--resume")[1] == f"{served_at} takes requests again\n"
    out = run("refresh", "--checkpoint", "runs/b", "--restart", *at)[1]
    meant = str(env.ROOT / "runs" / "b")
    assert out == f"{served_at} serves {meant} as version 5\n"
    uri = "s3://bucket/runs/b"
    facts = json.loads(run("refresh", "--checkpoint", uri, *at, "--json")[1])
    assert facts == {"target": served_at, "checkpoint": uri, "version": 5}
    assert run("scale", "3", *at)[1] == f"{served_at}: 3 replicas run\n"
    assert control.requests == [
        control_pb2.DrainRequest(within_s=60),
        control_pb2.DrainRequest(within_s=60, resume=True),
        control_pb2.RefreshRequest(checkpoint=meant, restart=True, within_s=300),
        control_pb2.RefreshRequest(checkpoint=uri, within_s=300),
        control_pb2.ScaleRequest(replicas=3, within_s=60),
    ]


@pytest.mark.parametrize("code", ["FAILED_PRECONDITION", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT"])
def test_an_operators_refusal_is_one_sentence(
    run: Run, served_at: str, control: ControlServer, code: str
) -> None:
    control.refusal = (grpc.StatusCode[code], "it scales itself")
    assert run("scale", "2", "--target", served_at) == (2, "", "error: it scales itself\n")


def test_one_who_is_no_operator_is_told_so(
    run: Run, served_at: str, control: ControlServer
) -> None:
    control.refusal = (grpc.StatusCode.PERMISSION_DENIED, "Drain wants an operator's key")
    expected = f"error: {served_at}: Drain wants an operator's key\n"
    assert run("drain", "--target", served_at) == (2, "", expected)


@pytest.mark.parametrize("words", [["--target"], ["run"]])
def test_a_watch_goes_on_until_ctrl_c(words: list[str], served_at: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    words = [*words, served_at] if words == ["--target"] else [str(tmp_path / "run")]
    with subprocess.Popen(
        [*CLI, "status", *words, "--watch", "--json"],
        cwd=env.ROOT,
        env=env.child_environment(starts_cluster=False),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        first, second = (json.loads(process.stdout.readline()) for _ in range(2))
        assert first == second
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")


def test_a_watch_on_a_terminal_draws_in_place(served_at: str) -> None:
    terminal, theirs = os.openpty()
    with subprocess.Popen(
        [*CLI, "status", "--target", served_at, "--watch"],
        cwd=env.ROOT,
        env={**env.child_environment(starts_cluster=False), "TERM": "xterm"},
        stdout=theirs,
        stderr=subprocess.PIPE,
    ) as process:
        drawn = b""
        while drawn.count(b"poems") < 5 or b"\x1b[1A" not in drawn:  # a line up
            drawn += os.read(terminal, 65536)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, b"")
    os.close(terminal)
    os.close(theirs)


def test_a_folder_that_cannot_be_written_is_one_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = ["tokenizer", "train", "--input", "configs/corpus/poems.tsv", "--vocab-size", "400"]
    code, _, err = run(*words, "--output", str(tmp_path / "file" / "x"))
    assert code == 2
    assert err.startswith("error: ")


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@" | true', "sh", *CLI, "models", "--json"],
        cwd=env.ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_ctrl_c_ends_with_130(tmp_path: Path) -> None:
    slow = tmp_path / "slow.txt"
    slow.write_text("春风又绿江南岸，明月何时照我还。\n\n" * 100_000)
    words = ["tokenizer", "train", "--input", str(slow), "--vocab-size", "400", "--output", "x"]
    with subprocess.Popen(
        [*CLI, *words],
        cwd=tmp_path,
        env=env.child_environment(starts_cluster=False),
        stderr=subprocess.PIPE,
    ) as process:
        libraries = Path(f"/proc/{process.pid}/maps")
        while "tokenizers" not in libraries.read_text():  # what it works with is imported then
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, b"")
    assert not (tmp_path / "x").exists()


def test_a_corpus_becomes_a_tokenizer_and_a_prepared_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("春风又绿江南岸。\n\n明月何时照我还。\n\n" * 50)
    (tmp_path / "b.jsonl").write_text('{"poem": "孤帆远影碧空尽"}\n' * 5)
    words = ["--vocab-size", "300", "--output", str(tmp_path / "tokenizer"), "--json"]
    code, out, err = run("tokenizer", "train", "--input", str(tmp_path / "a.txt"), *words)
    assert code == 0, err
    assert json.loads(out)["output"] == str(tmp_path / "tokenizer")

    files = ["--input", str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--column", "text=poem"]
    options += ["--workers", "0"]
    code, out, err = run(
        "data", "prepare", *files, *options, "--output", str(tmp_path / "data"), "--json"
    )
    assert code == 0, err
    facts = json.loads(out)
    assert facts["train"]["documents"] + facts["validation"]["documents"] == 105
    assert (tmp_path / "data" / "manifest.json").is_file()

    code, _, err = run("data", "prepare", *files, *options, "--output", "y", "--column", "text")
    assert code == 2
    assert "--column text is not of the form OURS=THEIRS" in err
