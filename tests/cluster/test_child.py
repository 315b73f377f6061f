"""Attached children: their lines, their exit codes, and signals handed on once."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cluster import env
from cluster.child import Child

MODULES = {
    "says": "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)",
    "counts": """
        import signal, sys, time
        seen = []
        signal.signal(signal.SIGINT, lambda *_: seen.append('int'))
        print('ready', flush=True)
        while not seen:
            time.sleep(0.01)
        time.sleep(0.3)
        print(*seen, flush=True)
        sys.exit(130)
    """,
    "deaf": """
        import signal, time
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print('ready', flush=True)
        time.sleep(60)
    """,
    "follows": """
        import os, time
        from cluster.child import end_with_parent
        end_with_parent()
        print(os.getpid(), flush=True)
        time.sleep(60)
    """,
}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in MODULES.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_lines_and_exit_code_come_back() -> None:
    lines: list[str] = []
    child = Child(["says"], on_line=lines.append)
    with child.attached():
        assert child.wait() == 3
    assert sorted(lines) == ["one", "two"]


def test_a_killed_child_has_the_exit_code_of_a_shell() -> None:
    child = Child(["deaf"], on_line=lambda line: None)
    with child.attached():
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == 128 + signal.SIGKILL


def test_leaving_the_block_ends_the_child() -> None:
    child = Child(["deaf"], on_line=lambda line: None)
    with child.attached():
        assert not child.has_ended()
    assert child.has_ended()


PARENT = """
import sys
from cluster.child import Child
child = Child([sys.argv[1]], on_line=lambda line: print(line, flush=True))
with child.attached():
    sys.exit(child.wait())
"""


def parent(module: str) -> subprocess.Popen[str]:
    """A command with an attached child, in a process group as a shell makes it."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, module],
        cwd=env.ROOT,
        process_group=0,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_ctrl_c_reaches_the_child_once() -> None:
    with parent("counts") as process:
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        out, _ = process.communicate(timeout=20)
    assert (out, process.returncode) == ("int\n", 130)


def test_a_second_ctrl_c_kills_a_child_that_does_not_listen() -> None:
    with parent("deaf") as process:
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGKILL


def test_a_terminated_command_takes_its_child_along() -> None:
    with parent("deaf") as process:
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM


KILLED = """
import sys
from cluster.child import Child
Child(["follows"], on_line=lambda line: print(line, flush=True)).wait()
"""


def test_a_child_ends_when_its_parent_is_killed() -> None:
    """Not even SIGKILL leaves a server behind that nobody knows of."""
    parent = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    with parent.stdout as lines:
        pid = lines.readline().strip()
    parent.kill()
    parent.wait()
    limit_s = time.monotonic() + 10
    while runs(pid):
        assert time.monotonic() < limit_s
        time.sleep(0.05)


def runs(pid: str) -> bool:
    """One that has ended stays until somebody asks how, where process 1 does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
