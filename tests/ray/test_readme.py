"""The README's tour, typed as it stands into a shell."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serve.launch import free_port

ROOT = Path(__file__).parents[2]
WITHIN_S = 900


def tour() -> str:
    """The README's block of shell commands."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 1
    return str(blocks[0])


def on_free_ports(block: str) -> str:
    """The block with ports that nobody else uses: the only change to it."""
    grpc_port, http_port = free_port("", 0), free_port("127.0.0.1", 0)
    served = re.search(r"^gptmoe serve .*(?= &$)", block, re.M)
    assert served
    words = f"{served[0]} grpc_port={grpc_port} http_port={http_port}"
    block = block.replace(served[0], words)
    return block.replace(":9000", f":{grpc_port}").replace(":8000", f":{http_port}")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tour")
    (folder / "configs").symlink_to(ROOT / "configs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "set -em\n" + on_free_ports(tour())
    shell = subprocess.Popen(
        ["bash", "-c", script],
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
        pytest.fail(f"the tour takes longer than {WITHIN_S} s:\n{text}")
    assert shell.returncode == 0, text
    return text


def test_the_tour_runs_as_it_stands(output: str) -> None:
    assert "1.3B+MoE-64" in output
    assert "bits per character" in output
    assert "Traceback" not in output
    assert output.count("春风") >= 3


def test_the_tour_ends_with_an_answer_over_http(output: str) -> None:
    answer = json.loads(re.findall(r'^\{"text".*\}', output, re.M)[-1])
    assert answer["text"].startswith("春风")
