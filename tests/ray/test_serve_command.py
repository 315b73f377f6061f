"""`python -m serve` as a process: on a cluster of its own, and on one that is there."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray.serve
import ray.util.state

from cluster import env, local
from cluster.client import Client

WITHIN_S = 180


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The command as a child process, and the endpoints that it prints."""
    command = [sys.executable, "-m", "serve", "--json", *arguments]
    process = subprocess.Popen(command, cwd=env.ROOT, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(WITHIN_S, process.kill)
    timer.start()
    with process:
        try:
            assert process.stdout
            yield process, json.loads(process.stdout.readline())
        finally:
            process.terminate()  # the timer kills it if that is not enough
            process.wait()
            timer.cancel()


def refused(*arguments: str) -> str:
    """What the command says last, on its way to exit code 2."""
    command = [sys.executable, "-m", "serve", *arguments]
    done = subprocess.run(command, cwd=env.ROOT, capture_output=True, text=True, timeout=WITHIN_S)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_a_cluster_of_its_own_until_ctrl_c(small_checkpoint: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    words = ["--checkpoint", str(small_checkpoint), "http_port=0", "grpc_port=0"]
    with serving(*words, "--state-file", str(state)) as (process, endpoints):
        assert json.loads(state.read_text()) == endpoints
        assert endpoints["checkpoint"] == str(small_checkpoint)
        with Client(endpoints["grpc"], timeout_s=30) as client:
            assert client.model().name == endpoints["name"] == "gptmoe"
            assert client.generate("春风", max_new_tokens=4).completion_tokens == 4
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert not state.exists()


def replicas(address: str) -> list[str]:
    """The classes of Ray Serve's actors that live on the cluster, except its own."""
    actors = ray.util.state.list_actors(address=address, filters=[("state", "=", "ALIVE")])
    return [actor.class_name for actor in actors if "Replica" in actor.class_name]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with local.session(workers=2) as cluster:
        yield cluster.address


def test_an_application_comes_and_goes_on_a_running_cluster(
    address: str, small_checkpoint: Path
) -> None:
    words = ["--checkpoint", str(small_checkpoint), "--address", address, "threads=1"]
    more = ["http_port=0", "grpc_port=0", "name=poems", "replicas.initial=2", "replicas.max=2"]
    with serving(*words, *more) as (process, endpoints):
        assert replicas(address) == ["ServeReplica:poems:Generator"] * 2
        with Client(endpoints["grpc"], timeout_s=30) as client:
            assert client.model().name == "poems"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert replicas(address) == [], "the cluster is still there, the application is gone"


def test_what_keeps_an_application_from_starting_is_one_sentence(
    address: str, small_checkpoint: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(small_checkpoint, damaged)
    (weights,) = damaged.glob("weights-*")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    words = ["--address", address, "http_port=0", "grpc_port=0"]
    message = refused("--checkpoint", str(damaged), "threads=1", *words)
    assert message.startswith(f"error: application gptmoe did not start: {weights.name} in")
    assert "is corrupt" in message

    large = ["threads=64", "health.start_s=5", *words]
    message = refused("--checkpoint", str(small_checkpoint), *large)
    says = "application gptmoe does not run after 5 s (a replica needs 64 CPU; 2 CPU are free)"
    assert says in message
    assert replicas(address) == []


def test_ray_serve_without_our_service_is_refused(address: str, small_checkpoint: Path) -> None:
    ray.serve.start(http_options={"port": 0})
    try:
        message = refused("--address", address, "--checkpoint", str(small_checkpoint), "threads=1")
        assert "runs on the cluster" in message
        assert "already, without our gRPC services" in message
    finally:
        ray.serve.shutdown()
