"""Writes what a study has found next to its runs: page.md, summary.md, results.json, curves.png."""

import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster import env
from train.state import replace_json

from .curves import curves
from .figure_files import CURVES, FIGURE
from .page import page, summary
from .plan import Row
from .results import Results
from .targets import findings

log = logging.getLogger(__name__)

PAGE, SUMMARY, RESULTS = "page.md", "summary.md", "results.json"


def publish(results: Results, sizes: Sequence[Row], folder: Path, command: str) -> None:
    """Write the page of what is finished, and the numbers of its curves."""
    replace_json(folder / CURVES, {"curves": curves(results)})
    replace_json(folder / RESULTS, as_plain(results))
    (folder / SUMMARY).write_text(summary(results) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(page(results, sizes, command), encoding="utf-8")


def draw(folder: Path) -> None:
    """Draw the curves in a process of its own; a warning where matplotlib is not installed."""
    done = subprocess.run(
        [sys.executable, "-m", "train.study.figure", str(folder)],
        env=env.child_environment(starts_cluster=False),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        log.warning(
            "%s was not drawn (%s); where matplotlib is installed: python -m train.study.figure %s",
            folder / FIGURE,
            reason,
            folder,
        )


def as_plain(results: Results) -> dict[str, Any]:
    """The numbers behind the page, for other programs."""
    return {
        "finished": len(results.runs),
        "missing": list(results.missing),
        "passes": results.passes,
        "tokens_per_s": {name: list(speeds) for name, speeds in results.speeds.items()},
        "arms": {
            it.variant.name: {
                "d_ff": it.spec.d_ff,
                "block_flops": it.flops.blocks,
                "final_losses": results.losses(it.variant),
            }
            for it in results.models
        },
        "targets": [asdict(finding) for finding in findings(results)],
    }
