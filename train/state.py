"""state.json of a run's folder: what the run is doing, for whoever watches it."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One moment of a run."""

    state: Literal["preparing", "running", "finished", "failed", "interrupted"]
    message: str = ""
    max_steps: int = 0
    cluster_address: str = ""
    dashboard_url: str = ""
    job_id: str = ""
    pid: int = 0


def write_state(run_dir: Path, state: State) -> None:
    """Replace run_dir/state.json in one rename."""
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / "state.json.tmp"
    temporary.write_text(json.dumps(asdict(state), ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, run_dir / "state.json")
