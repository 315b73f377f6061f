"""The gptmoe command, called in this process."""

import pytest

from cluster import env
from cluster.cli import main as cli


class Run:
    """Calls the command in this process: Python starts and imports torch once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self._monkeypatch.setattr("sys.argv", ["gptmoe", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = self._capsys.readouterr()
        return int(ended.value.code or 0), out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """From the checkout's folder, as the documentation has it."""
    monkeypatch.chdir(env.ROOT)
    return Run(monkeypatch, capsys)
