"""`python -m serve` up to the point where Ray would start."""

import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptmoe.errors import ClusterError, ConfigError
from serve.command import announced, main
from serve.config import AuthConfig, EdgeConfig, ServeConfig
from serve.launch import (
    Endpoints,
    await_answer,
    check_threads,
    last_line,
    room,
    running,
)
from serve.ports import free_port

ENDPOINTS = Endpoints(
    name="gptmoe",
    grpc="127.0.0.1:9000",
    http="http://127.0.0.1:8000",
    dashboard="http://127.0.0.1:8265",
    address="127.0.0.1:6379",
    checkpoint="runs/a/checkpoints/step-00000020",
)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "error: key checkpoint is missing"),
        (["--checkpoint", "no/such/folder"], "error: no/such/folder is not a folder"),
        (["--checkpoint", "x", "engine.max_queues=1"], "did you mean engine.max_queue?"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert sentence in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_an_empty_folder_is_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(tmp_path)]) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err


def options(**given: Any) -> Any:
    return SimpleNamespace(**{"json": False, "state_file": None} | given)


def test_people_read_where_the_model_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with announced(ENDPOINTS, options(), sys.stdout):
        assert "gRPC       127.0.0.1:9000\n" in capsys.readouterr().out


def test_people_read_where_the_edge_is(capsys: pytest.CaptureFixture[str]) -> None:
    edge_only = replace(ENDPOINTS, grpc="", edge="127.0.0.1:9443")
    with announced(edge_only, options(), sys.stdout):
        out = capsys.readouterr().out
    assert "gRPC edge  127.0.0.1:9443\n" in out
    assert "gRPC       " not in out


def test_programs_read_one_line_of_json_or_a_file_that_goes_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "state.json"
    with announced(ENDPOINTS, options(json=True, state_file=file), sys.stdout):
        line = capsys.readouterr().out
        assert json.loads(line)["grpc"] == "127.0.0.1:9000"
        assert file.read_text() == line
    assert list(tmp_path.iterdir()) == []


def test_a_state_file_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "missing" / "state.json"
    with pytest.raises(ConfigError, match=r"--state-file .* cannot be written"):  # noqa: SIM117
        with announced(ENDPOINTS, options(state_file=file), sys.stdout):
            pytest.fail("must not get here")


def test_keys_certificates_and_gpus_are_looked_at_before_a_cluster_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.launch.pinned", lambda checkpoint: checkpoint)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("serve.launch.local.session", lambda **_: pytest.fail("it has started"))
    missing = tmp_path / "missing"
    wanted = ServeConfig(checkpoint=tmp_path, http_port=0, grpc_port=0)
    bad = {
        "device='cuda' is not here; use one of cpu": {"device": "cuda"},
        "the keys file .*missing cannot be read": {"auth": AuthConfig(keys=missing)},
        "are no certificate and its private key": {
            "edge": EdgeConfig(port=0, tls_cert=missing, tls_key=missing)
        },
    }
    for sentence, part in bad.items():
        config = replace(wanted, **part)
        with pytest.raises(ConfigError, match=sentence), running(config):
            pytest.fail("must not get here")


def test_what_is_free_in_words() -> None:
    assert room({}) == "0 CPU are free"
    assert room({"CPU": 2.0, "GPU": 1.0}) == "2 CPU and 1 GPU are free"


def test_a_port_that_does_not_answer_is_not_waited_for_without_end() -> None:
    target = f"127.0.0.1:{free_port('127.0.0.1')}"
    with pytest.raises(ClusterError, match=f"gRPC at {target} does not answer: UNAVAILABLE"):
        await_answer(target, "gptmoe", within_s=0.1)


def test_the_reason_of_a_failed_deployment_is_its_last_line() -> None:
    assert last_line("Error:\nTraceback (most recent call last):\n  x\nValueError: y\n\n") == (
        "ValueError: y"
    )
    assert last_line("gptmoe.errors.CheckpointError: a shard is corrupt") == "a shard is corrupt"
    assert "no reason" in last_line("")


@pytest.mark.parametrize(("threads", "workers", "cores"), [(0, 9, 2), (2, 1, 2), (1, 9, 2)])
def test_threads_within_the_cores_or_one_a_worker_are_taken(
    threads: int, workers: int, cores: int
) -> None:
    check_threads(threads, workers, cores)


def test_more_threads_than_cores_are_refused_with_the_most_there_can_be() -> None:
    with pytest.raises(ConfigError, match=r"threads=2 for each of 4 replicas or shards .* 4 cores"):
        check_threads(2, workers=4, cores=4)
    with pytest.raises(ConfigError, match=r"for one replica .* use at most 3, or 0 for that"):
        check_threads(64, workers=1, cores=3)
