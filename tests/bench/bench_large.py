"""The 0.35B+MoE-64 model (6.7 B parameters, 13.4 GB in bf16), memory-mapped, on a small machine.

    python -m tests.bench.bench_large [--folder DIR] [--preset 0.35B+MoE-64] [--json FILE]

Writes a checkpoint of random weights, a layer at a time, takes it out of the page cache, and loads
it in a fresh process that checks sizes only: seconds to load, to the first token of a prompt, ms a
token cold and warm beside the floor (bytes of the active weights by the bandwidth of reading), and
the peak of resident memory after every expert was used, over that before loading. Goal: at most 1.1
times the weights. Then the seconds of `gptmoe verify`. Needs 14 GB of disk and 20 GiB of memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gptmoe.checkpoint import open_checkpoint, whole
from gptmoe.checkpoint.boxes import Piece
from gptmoe.checkpoint.write import commit, start, write_part
from gptmoe.config import to_dict
from gptmoe.generate.engine import Engine
from gptmoe.generate.packed import PackedExperts
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.loaded import load
from gptmoe.model.presets import preset
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT
from gptmoe.stored import spec_of
from tests import small_model
from tests.bench.decoding import active_bytes, random_values
from tests.bench.quiet import read_bandwidth

GOAL = 1.1
GB = 1e9
PROMPT, NEW = 20, 64
MANY, LONG = 16, 250


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="0.35B+MoE-64")
    parser.add_argument("--folder", type=Path, help="where to write it; else a temporary folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        began_s = time.perf_counter()
        checkpoint = write(Path(scratch) / "step-00000001", preset(arguments.preset).spec)
        print(f"written in {time.perf_counter() - began_s:.0f} s", flush=True)
        forget(checkpoint)
        me = [sys.executable, "-m", "tests.bench.bench_large", "--threads", str(arguments.threads)]
        out = subprocess.run([*me, "--child", str(checkpoint)], stdout=subprocess.PIPE, check=True)
        facts = json.loads(out.stdout.splitlines()[-1])
        facts["verify_s"] = verify_s(checkpoint)
    facts |= {"title": "memory of the large model", "reached": facts["ratio"] <= GOAL}
    print(table(facts))
    if arguments.json:
        arguments.json.write_text(json.dumps([facts], indent=1) + "\n", encoding="utf-8")


def write(folder: Path, spec: ModelSpec) -> Path:
    """A checkpoint with one file a layer, of which one is in memory at a time."""
    draft = folder.with_name(folder.name + ".tmp")
    start(draft)
    world = spec.num_layers + 1
    for rank, pieces in enumerate(_by_layer(spec)):
        write_part(draft, rank, world, {"weights": pieces})
    words = small_model.tokenizer()
    commit(draft, folder, world, {"model": to_dict(spec)}, {"step": 1}, words.save)
    return folder


def _by_layer(spec: ModelSpec) -> Iterator[list[Piece]]:
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in GPT(spec).named_parameters()}
    owners = [f"layers.{layer}." for layer in range(spec.num_layers)]
    for owner in [*owners, ""]:
        mine = [
            name
            for name in shapes
            if (name.startswith(owner) if owner else not name.startswith("layers."))
        ]
        yield [whole(name, random_values(name, shapes[name])) for name in mine]


def forget(folder: Path) -> None:
    """Take its files out of the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(checkpoint: Path) -> dict[str, Any]:
    """In a process that has done nothing else."""
    torch.ones(512, 512).bfloat16() @ torch.ones(512, 512).bfloat16()  # kernels and threads exist
    spec = spec_of(open_checkpoint(checkpoint, verify=False))
    with torch.device("meta"):
        weights = sum(2 * parameter.numel() for parameter in GPT(spec).parameters())
    before = resident_bytes("VmRSS")
    began_s = time.perf_counter()
    model = load(checkpoint, "bfloat16", verify=False)
    load_s = time.perf_counter() - began_s
    engine = model.engine(EngineConfig(max_batch_size=1))
    first_s, cold_s = answer(engine, 1)
    answer(engine, 2)
    _, warm_s = answer(engine, 2)
    every_expert(engine)
    peak = resident_bytes("VmHWM") - before
    del engine
    return {
        "weights_bytes": weights,
        "load_s": load_s,
        "first_token_s": first_s,
        "cold_token_s": cold_s,
        "warm_token_s": warm_s,
        "floor_s": active_bytes(spec) / read_bandwidth(),
        "active_bytes": active_bytes(spec),
        "mapped": not any(isinstance(m, PackedExperts) for m in model.network.modules()),
        "peak_bytes": peak,
        "ratio": peak / weights,
    }


def answer(engine: Engine, seed: int) -> tuple[float, float]:
    """Seconds to the first token of a random prompt, and of each further one."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3000, (PROMPT,), generator=generator).tolist()
    sampling = SamplingParams(max_new_tokens=NEW, temperature=0, ignore_end=True)
    engine.add(Request(f"one-{seed}-{time.monotonic_ns()}", tuple(prompt), sampling))
    began_s, first_s, count = time.perf_counter(), 0.0, 0
    while engine.has_work:
        count += sum(len(delta.token_ids) for delta in engine.step())
        first_s = first_s or (time.perf_counter() - began_s if count else 0.0)
    return first_s, (time.perf_counter() - began_s - first_s) / (NEW - 1)


def every_expert(engine: Engine) -> None:
    """Prompts of random tokens, so many that each expert gets some."""
    generator = torch.Generator().manual_seed(9)
    sampling = SamplingParams(max_new_tokens=1, temperature=0, ignore_end=True)
    for index in range(MANY):
        prompt = torch.randint(3000, (LONG,), generator=generator).tolist()
        engine.add(Request(f"many-{index}", tuple(prompt), sampling))
    while engine.has_work:
        engine.step()


def resident_bytes(kind: str) -> int:
    """VmRSS or VmHWM (its peak) of this process; pages of mapped files count."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def verify_s(checkpoint: Path) -> float:
    """Seconds of the command that compares checksums."""
    began_s = time.perf_counter()
    command = [sys.executable, "-m", "cluster.cli", "verify", str(checkpoint)]
    subprocess.run(command, check=True)
    return time.perf_counter() - began_s


def table(facts: dict[str, Any]) -> str:
    """The figures for people."""
    return (
        f"weights {facts['weights_bytes'] / GB:.2f} GB, experts "
        f"{'memory-mapped' if facts['mapped'] else 'packed'}; peak {facts['peak_bytes'] / GB:.2f} "
        f"GB over the process: {facts['ratio']:.3f} times (goal {GOAL})\n"
        f"load {facts['load_s']:.1f} s, first token {facts['first_token_s']:.2f} s, a token cold "
        f"{1e3 * facts['cold_token_s']:.1f} ms, warm {1e3 * facts['warm_token_s']:.1f} ms; floor "
        f"{1e3 * facts['floor_s']:.1f} ms for {facts['active_bytes'] / GB:.2f} GB of weights\n"
        f"gptmoe verify {facts['verify_s']:.1f} s"
    )


if __name__ == "__main__":
    main()
