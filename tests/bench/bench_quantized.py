"""What weights in 8 and 4 bits cost: bits per character on held-out text, and bytes.

    python -m tests.bench.bench_quantized [--checkpoint RUN --data TEXT] [--json FILE]

Products in bfloat16 but for the first row. Without a checkpoint, a model of 6 layers x 256 with 8
experts is trained on the bundled poems first (minutes). Held out is the run's validation split.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CASES = {  # dtype, weights
    "float32": ("float32", ""),
    "bfloat16": ("bfloat16", ""),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}
MOST = {"bfloat16": 0.005, "int8": 0.01, "int4": 0.1}
"""Bits per character more than in float32 that we take."""
TRAINING = (
    "data.validation_fraction=0.1",
    "parallel.ep=1",
    "schedule.warmup_steps=10",
    "train.max_steps=150",
    "train.validate_every_steps=150",
    "checkpoint.every_steps=150",
)


def main() -> None:
    """Train or open, evaluate, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="a run, or a checkpoint with --data")
    parser.add_argument("--data", type=Path, help="text, or a prepared folder; else the run's own")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = arguments.checkpoint or _trained(Path(scratch) / "run")
        facts = list(measure(run, arguments.data or run / "data"))
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def measure(checkpoint: Path, data: Path) -> Iterator[dict[str, Any]]:
    """Bits per character of each kind, by the command that everybody has."""
    bits: dict[str, float] = {}
    for name, (dtype, weights) in CASES.items():
        words = ["--checkpoint", str(checkpoint), "--data", str(data), "--dtype", dtype]
        out = _gptmoe("evaluate", *words, "--weights", weights, "--json")
        bits[name] = json.loads(out)["bits_per_char"]
        more = bits[name] - bits["float32"]
        reached = more <= MOST.get(name, 0.0)
        print(
            f"{name:<10}{bits[name]:8.4f} bits per character ({more:+.4f}, at most "
            f"{MOST.get(name, 0.0):+g})   {'yes' if reached else 'NO'}",
            flush=True,
        )
        yield {"title": f"loss of {name}", "bits_per_char": bits[name], "reached": reached}


def _trained(run: Path) -> Path:
    config = ROOT / "configs" / "train" / "poetry.toml"
    _gptmoe("pretrain", str(config), f"run.dir={run}", *TRAINING)
    return run


def _gptmoe(*words: str) -> str:
    command = [sys.executable, "-m", "cluster.cli", *words]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    main()
