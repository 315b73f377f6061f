"""Memory of a served model's shards against its weights, and how fast they load.

    python -m tests.bench.bench_shard_memory [--json FILE]

A model of 5.5 GB in bfloat16 on two actors of a local Ray cluster: as stages, which hold every
weight once, and as data ranks that share the experts and hold all else twice. Memory is that of
both processes (proportional set size: shared pages are counted once), once they have generated a
few tokens; keys and values of four sequences of 256 tokens, Python, torch and Ray are in it. Goal,
for stages: at most 1.1 times the model's weights in sum.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import ray
import torch

from cluster import env
from cluster.shards.group import ShardGroup
from gptmoe.checkpoint import open_checkpoint, save, whole
from gptmoe.config import to_dict
from gptmoe.generate.engine import Engine
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT
from gptmoe.shard.parts import arrange
from gptmoe.stored import spec_of
from tests import small_model
from tests.faults.shards import job_of

LAYOUTS = {"pp=2": {"pp": 2}, "dp=2 ep=2": {"dp": 2, "ep": 2}}
GOAL, GOAL_FOR = 1.1, "pp=2"
SEQUENCES = 4
GB = 1e9


def write(run_dir: Path) -> Path:
    """A model of random weights."""
    words = small_model.tokenizer()
    spec = ModelSpec(
        num_layers=8,
        d_model=1024,
        num_heads=8,
        d_ff=4096,
        vocab_size=words.vocab_size,
        max_seq_len=256,
        num_experts=(80,) * 4,
    )
    with torch.device("meta"):
        network = GPT(spec)
    weights = {
        name: torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, 0.02)
        for name, parameter in network.named_parameters()
    }
    folder = run_dir / "checkpoints" / "step-00000001"
    save(
        folder,
        rank=0,
        world=1,
        barrier=lambda: None,
        groups={"weights": [whole(name, tensor) for name, tensor in weights.items()]},
        config={"model": to_dict(spec)},
        progress={"step": 1, "samples": 0, "tokens": 0},
        copy_files=words.save,
    )
    return folder


def resident_bytes(pid: int) -> int:
    """Of a process, its share of shared pages included."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/{pid}/smaps_rollup has no Pss")


def main() -> None:
    """Print sizes and seconds by layout; write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    env.prepare()
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder))
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        ratios = {name: measure(path, name, layout) for name, layout in LAYOUTS.items()}
        ray.shutdown()
    if arguments.json:
        reached = ratios[GOAL_FOR] <= GOAL
        facts = {"title": f"memory of shards, {GOAL_FOR}", "reached": reached, "ratios": ratios}
        arguments.json.write_text(json.dumps([facts], indent=1) + "\n", encoding="utf-8")


def measure(path: Path, name: str, layout: dict[str, int]) -> float:
    """Memory of one layout's actors, in times the model's weights."""
    spec = spec_of(open_checkpoint(path, verify=False))
    weights = 2 * sum(parameter.numel() for parameter in _meta(spec).parameters())
    job = job_of(path, spec, arrange(spec, **layout), dtype="bfloat16", run="memory")
    job = replace(job, slots=SEQUENCES)  # as many as the engine has
    began_s = time.monotonic()
    with ShardGroup(job) as group:
        seconds = time.monotonic() - began_s
        generate(group, spec)
        owners = group.topology().owners
        resident = sum(resident_bytes(owner.pid) for owner in owners)
        held = sum(owner.counters["weights_bytes"] for owner in owners)
    ratio = resident / weights
    print(
        f"{name:10} weights {weights / GB:.2f} GB, held {held / GB:.2f} GB, "
        f"memory {resident / GB:.2f} GB: {ratio:.3f} times the weights, "
        f"{resident / held:.3f} times those held; started in {seconds:.1f} s",
        flush=True,
    )
    return ratio


def generate(group: ShardGroup, spec: ModelSpec) -> None:
    words = small_model.tokenizer()
    engine = Engine(group, words, spec.max_seq_len, EngineConfig(max_batch_size=SEQUENCES))
    for index in range(SEQUENCES):
        sampling = SamplingParams(max_new_tokens=16, temperature=0, ignore_end=True)
        engine.add(Request(str(index), tuple(range(50 + index, 80 + index)), sampling))
    while engine.has_work:
        engine.step()


def _meta(spec: ModelSpec) -> GPT:
    with torch.device("meta"):
        return GPT(spec)


if __name__ == "__main__":
    main()
