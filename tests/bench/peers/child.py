"""A peer as a process: a script that is told one thing a line, as JSON, and answers with one.

Between its turns the process is stopped: threads of some peers spin while they wait.
"""

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.peers.environments import Environment, Missing, python_of

FOLDER = Path(__file__).parent


class Peer:
    """One of the scripts `*_peer.py` in its environment."""

    def __init__(self, environment: Environment, script: str, *arguments: str) -> None:
        self.name = environment.name
        command = [str(python_of(environment)), str(FOLDER / script), *arguments]
        # Not a pipe, which nobody reads: it would fill and block. Closed by `close`.
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            process_group=0,  # with its children; if we are killed, the system ends a stopped one
        )
        self.about = self._answer()
        self._signal(signal.SIGSTOP)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, **what: Any) -> dict[str, Any]:
        """Its answer. Raises Missing with the end of what it said if it ended instead."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End it."""
        self._signal(signal.SIGKILL)
        self._process.communicate()
        self._said.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._process.wait()
        self._said.seek(0)
        said = self._said.read()
        raise Missing(
            f"{self.name}: it ended with {self._process.returncode}: {said.strip()[-600:]}"
        )

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)
