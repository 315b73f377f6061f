"""The README's blocks of shell commands, typed as they stand into a shell."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serve.ports import free_port

ROOT = Path(__file__).parents[2]
WITHIN_S = 900
BEFORE = """set -em
trap 'kill %1 2>/dev/null || true' EXIT
"""
"""The first command that fails ends the shell, and the server with it."""


def blocks() -> list[str]:
    """The tour, then what can be done with a server."""
    found = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(found) == 2
    return found


def on_free_ports(block: str) -> str:
    """The block with ports that nobody else uses: the only change to it."""
    http_port = free_port("127.0.0.1")
    grpc_port = free_port("", besides={http_port})
    edge_port = free_port("", besides={http_port, grpc_port})
    served = re.search(r"^gptmoe serve .*(?= &$)", block, re.M)
    assert served
    words = f"{served[0]} grpc_port={grpc_port} http_port={http_port}"
    block = block.replace(served[0], words.replace("port=9443", f"port={edge_port}"))
    for usual, free in ((8000, http_port), (9000, grpc_port), (9443, edge_port)):
        block = block.replace(f":{usual}", f":{free}")
    return block


def typed(block: str, folder: Path) -> str:
    """What a shell says to a block."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = subprocess.Popen(
        ["bash", "-c", BEFORE + on_free_ports(block)],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        text, _ = shell.communicate(timeout=WITHIN_S)
    except subprocess.TimeoutExpired:
        os.killpg(shell.pid, signal.SIGTERM)
        text, _ = shell.communicate(timeout=60)
        pytest.fail(f"the block takes longer than {WITHIN_S} s:\n{text}")
    assert shell.returncode == 0, text
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tour")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


def test_the_tour_runs_as_it_stands_and_ends_with_an_answer_over_http(folder: Path) -> None:
    output = typed(blocks()[0], folder)
    assert "1.3B+MoE-64" in output
    assert "bits per character" in output
    assert output.count("春风") >= 3
    answer = json.loads(re.findall(r'^\{"text".*\}', output, re.M)[-1])
    assert answer["text"].startswith("春风")


def test_then_a_server_is_asked_and_operated_as_the_block_says(folder: Path) -> None:
    output = typed(blocks()[1], folder)
    answer = json.loads(re.findall(r'^\{"id".*\}', output, re.M)[-1])
    assert answer["usage"]["completion_tokens"] > 0
    assert output.count("明月") >= 1
    assert "2 replicas, weights version 1" in output
    assert "each replica computes with 1 thread" in output
    assert output.endswith("takes no new requests\n")
