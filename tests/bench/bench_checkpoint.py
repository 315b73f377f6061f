"""What a checkpoint costs: the wait of the loop, and its bandwidth against a plain copy.

    python -m tests.bench.bench_checkpoint [--rounds 5] [--json FILE]

A 6 x 512 model with 8 experts and AdamW's moments: about 0.9 GB. Goals: the loop waits for at most
a tenth of a synchronous save; saving and loading, checksums included, reach half the bandwidth of a
plain copy of the same files (written through to the disk, as ours are).
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import torch

from gptmoe import checkpoint
from gptmoe.checkpoint import open_checkpoint, whole
from gptmoe.model.spec import ModelSpec
from gptmoe.parallel.apply import build
from gptmoe.parallel.mesh import single
from tests.bench.side_by_side import Comparison, compare, table, write_json
from train.saving import Groups, Saver

SPEC = ModelSpec(
    num_layers=6, d_model=512, num_heads=8, d_ff=2048, vocab_size=16_384, num_experts=(8, 8, 8)
)


def state() -> Groups:
    """Weights and moments as pieces."""
    model = build(SPEC, single(), torch.device("cpu"))
    weights = [whole(name, parameter.detach()) for name, parameter in model.named_parameters()]
    moments = [
        whole(f"{kind}/{piece.name}", torch.rand_like(piece.tensor))
        for kind in ("exp_avg", "exp_avg_sq")
        for piece in weights
    ]
    return {"weights": weights, "optimizer": moments}


def saver(folder: Path) -> Saver:
    """One rank's."""
    return Saver(
        folder,
        rank=0,
        world=1,
        barrier=lambda: None,
        config={},
        copy_files=lambda path: None,
        keep=1,
    )


def copied(source: Path, target: Path) -> None:
    """The same files, through to the disk."""
    for file in source.iterdir():
        with file.open("rb") as reading, (target / file.name).open("wb") as writing:
            shutil.copyfileobj(reading, writing, 2**20)
            writing.flush()
            os.fsync(writing.fileno())


def measure(folder: Path, rounds: int) -> list[Comparison]:
    """All three comparisons."""
    groups, saving = state(), saver(folder / "run")
    newest = folder / "run" / "step-00000001"
    other = folder / "copy"
    other.mkdir()

    def synchronous() -> None:
        saving.start("step-00000001", groups, {"step": 1})
        saving.finish()

    def wait() -> None:
        saving.start("step-00000001", groups, {"step": 1})

    def write() -> None:
        checkpoint.save(
            newest, rank=0, world=1, barrier=lambda: None, groups=groups, config={}, progress={}
        )

    def read_all() -> None:
        stored = open_checkpoint(folder / "run" / "step-00000001")
        for group in stored.manifest.groups:
            for name in stored.names(group):
                stored.read(name, group=group).clone()

    synchronous()
    waits = compare(
        "loop's wait against a synchronous save",
        ours=("start", wait),
        peer=("save", synchronous),
        goal=10.0,
        rounds=rounds,
        after_each=saving.finish,
    )
    save = compare(
        "writing with checksums against copying the files",
        ours=("write", write),
        peer=("copy", lambda: copied(newest, other)),
        goal=0.5,
        rounds=rounds,
    )
    load = compare(
        "opening, checking and reading against copying the files",
        ours=("load", read_all),
        peer=("copy", lambda: copied(newest, other)),
        goal=0.5,
        rounds=rounds,
    )
    saving.close()
    return [waits, save, load]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What a checkpoint costs.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all rounds to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        comparisons = measure(Path(folder), arguments.rounds)
    print(table(comparisons))
    if arguments.json:
        write_json(arguments.json, comparisons)


if __name__ == "__main__":
    main()
