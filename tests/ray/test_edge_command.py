"""`gptmoe serve --edge-only --keys` and callers: certificates on both sides, and a key."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import env
from tests.certificates import authority

WITHIN_S = 240


def gptmoe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.run(command, cwd=env.ROOT, capture_output=True, text=True, timeout=WITHIN_S)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = authority(tmp_path, "authority")
    made.issue("server")
    caller = made.issue("caller")
    caller.cert.write_text(caller.cert.read_text() + caller.key.read_text())
    (tmp_path / "keys").write_text("spring-wind\n")
    (tmp_path / "keys").chmod(0o600)
    (tmp_path / "wrong").write_text("autumn-moon\n")
    return tmp_path


@pytest.fixture
def endpoints(small_checkpoint: Path, folder: Path) -> Iterator[dict[str, Any]]:
    words = ["http_port=0", "edge.port=0", f"edge.client_ca={folder / 'authority.pem'}"]
    words += [f"edge.tls_cert={folder / 'server.pem'}", f"edge.tls_key={folder / 'server.key'}"]
    options = ["--edge-only", "--keys", str(folder / "keys"), "--json"]
    command = [sys.executable, "-m", "cluster.cli", "serve", "--checkpoint", str(small_checkpoint)]
    process = subprocess.Popen(
        [*command, *words, *options], cwd=env.ROOT, stdout=subprocess.PIPE, text=True
    )
    timer = threading.Timer(WITHIN_S, process.kill)
    timer.start()
    with process:
        try:
            assert process.stdout
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()
            process.wait()
            timer.cancel()


def test_only_the_edge_answers_and_only_who_may_ask(
    endpoints: dict[str, Any], folder: Path
) -> None:
    assert endpoints["grpc"] == "", "Ray Serve's port is not opened"
    ask = ["generate", "春风", "--target", endpoints["edge"], "--max-new-tokens", "4"]
    known = ["--ca", str(folder / "authority.pem"), "--cert", str(folder / "caller.pem")]
    keyed = ["--token-file", str(folder / "keys")]
    done = gptmoe(*ask, *known, *keyed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("春风")
    status = gptmoe("status", "--target", endpoints["edge"], "--json", *known, *keyed)
    assert json.loads(status.stdout)["application"] == "gptmoe"
    for words, sentence in (
        ([*known, "--token-file", str(folder / "wrong")], "the key is not one of this server's"),
        (known, "a key is wanted and none came"),
        ([*known[:2], *keyed], "no server answers"),
        (keyed, "no server answers"),
    ):
        refused = gptmoe(*ask, *words)
        assert refused.returncode == 2
        assert sentence in refused.stderr
