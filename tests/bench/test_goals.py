"""Each bench is run as its own process and must reach its goals; its table is shown."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHES = sorted(Path(__file__).parent.glob("bench_*.py"))


@pytest.mark.parametrize("bench", BENCHES, ids=[bench.stem for bench in BENCHES])
def test_the_goals_are_reached(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = tmp_path / "facts.json"
    module = f"tests.bench.{bench.stem}"
    command = [sys.executable, "-m", module, "--json", str(facts)]
    with capsys.disabled():
        print()
        subprocess.run(command, cwd=bench.parents[2], check=True)
    missed = [c["title"] for c in json.loads(facts.read_text("utf-8")) if not c["reached"]]
    assert not missed
