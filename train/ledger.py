"""python -m train.ledger RUN_DIR: the proof that no sample was repeated or left out.

Each data rank appends what it has loaded to ledger/ATTEMPT-RANK.jsonl, an attempt being one start
of all workers. A later attempt goes on after some step: what earlier ones did after it is void, as
are the weights that came of it.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptmoe.checkpoint import open_checkpoint
from gptmoe.errors import DataError, GptMoeError
from gptmoe.lines import LineFile

FOLDER = "ledger"


class Ledger:
    """One data rank's pages of one attempt."""

    def __init__(self, run_dir: Path, attempt: int, data_rank: int, done: int) -> None:
        folder = run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._page = LineFile(folder / f"{attempt:05d}-{data_rank:05d}.jsonl")
        self._page.append(json.dumps({"done": done}))

    def note(self, step: int, first: int, count: int) -> None:
        """Samples first .. first + count - 1 went into step `step`."""
        self._page.append(json.dumps({"step": step, "first": first, "count": count}))

    def close(self) -> None:
        """Write what still waits for room on the disk."""
        self._page.close()


def next_attempt(run_dir: Path) -> int:
    """The number of a new attempt, from 1."""
    pages = (run_dir / FOLDER).glob("*.jsonl")
    return max((int(page.name.partition("-")[0]) for page in pages), default=0) + 1


def read(run_dir: Path) -> dict[int, list[range]]:
    """The samples of each step that the newest weights have learned from, in order."""
    attempts: dict[int, list[Path]] = defaultdict(list)
    for page in sorted((run_dir / FOLDER).glob("*.jsonl")):
        attempts[int(page.name.partition("-")[0])].append(page)
    steps: dict[int, list[range]] = {}
    for attempt in sorted(attempts):
        rows = [row for page in attempts[attempt] for row in _rows(page)]
        done = max((row["done"] for row in rows if "done" in row), default=None)
        if done is None:  # all were killed while they wrote their first line
            continue
        steps = {step: samples for step, samples in steps.items() if step <= done}
        for row in rows:
            if "step" in row:
                samples = range(row["first"], row["first"] + row["count"])
                steps.setdefault(row["step"], []).append(samples)
    return {step: sorted(steps[step], key=lambda samples: samples.start) for step in sorted(steps)}


def check(steps: Mapping[int, Sequence[range]], batch_sequences: int) -> None:
    """Raise DataError unless each step took its samples, each of them once, and none is missing."""
    for step, number in zip(steps, range(1, len(steps) + 1), strict=True):
        taken = [sample for samples in steps[step] for sample in samples]
        wanted = list(range((number - 1) * batch_sequences, number * batch_sequences))
        if step != number or taken != wanted:
            raise DataError(
                f"step {step} of the ledger holds the samples {steps[step]}, but step {number} "
                f"takes {wanted[0]} to {wanted[-1]}, each once"
            )


def proof(run_dir: Path) -> str:
    """What the ledger of a run proves, in a sentence. Raises DataError for what it cannot prove."""
    progress = open_checkpoint(run_dir, verify=False).progress
    steps = read(run_dir)
    check(steps, progress["samples"] // progress["step"])
    if len(steps) < progress["step"]:
        raise DataError(
            f"the ledger of {run_dir} holds {len(steps)} steps, its newest checkpoint has taken "
            f"{progress['step']}; what the others have learned from is not known"
        )
    last = max(samples.stop for samples in steps[len(steps)]) - 1
    return f"{len(steps)} steps have learned from the samples 0 to {last}, from each of them once"


def main(words: Sequence[str]) -> int:
    """Print the proof for the folder of a run."""
    parser = argparse.ArgumentParser(prog="python -m train.ledger", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    try:
        sys.stdout.write(proof(parser.parse_args(words).run_dir) + "\n")
    except GptMoeError as error:
        sys.stderr.write(f"failed: {error}\n")
        return 2
    return 0


def _rows(page: Path) -> list[dict[str, int]]:
    """A killed rank may have left half a line at the end: that step was not completed."""
    rows = []
    for line in page.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
