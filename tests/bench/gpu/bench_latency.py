"""The described latency table on one GPU: 8 models, input 20, output 128, batch 1, bf16.

    python -m tests.bench.gpu.bench_latency [--presets 1.3B 0.35B+MoE-64] [--rounds 5] [--json FILE]

Needs gptmoe/ and tests/, torch for CUDA (which brings Triton and numpy), safetensors, tokenizers.
Random weights; what does not fit is named. For each model: ms of the whole answer, peak memory,
what fraction of the GPU's bandwidth (a copy in the same run) the decoding steps read of the active
weights, and the same of the GPU's own part of a step (its graph, by the GPU's clock: the rest is
the CPU's, and as long for a small model as for a large one); then how many times as long a step
takes that gives a text the same bits in any batch (`invariant`), and one that is not captured.
Beside them the figures that were described for A100 GPUs (fp16, FasterTransformer), some of them on
several. Goal: 0.8 of bandwidth.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch

from gptmoe.generate import gpu
from gptmoe.generate.engine import Engine
from gptmoe.generate.gpu.executor import PagedExecutor
from gptmoe.generate.gpu.graphs import DecodingGraphs
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.loaded import LoadedModel
from gptmoe.model.counts import parameters
from gptmoe.model.presets import preset
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT
from gptmoe.stored import kept_dtype
from tests.bench.decoding import Letters, active_bytes

INPUT, OUTPUT = 20, 128
GOAL = 0.8
GPU = torch.device("cuda")
COPY_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Described:
    """On A100 GPUs; the memory is one GPU's."""

    latency_ms: float
    memory_mb: int
    gpus: int


TABLE = {
    "1.3B": Described(399.66, 9476, 1),
    "2.7B": Described(753.37, 17340, 1),
    "3.6B": Described(777.54, 22558, 1),
    "0.35B+MoE-64": Described(356.22, 15772, 1),
    "1.3B+MoE-32": Described(581.34, 33294, 1),
    "1.3B+MoE-64": Described(586.18, 57880, 1),
    "2.7B+MoE-64": Described(742.43, 61054, 2),
    "3.6B+MoE-64": Described(662.57, 42724, 4),
}


def main() -> None:
    """Measure what fits, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--presets", nargs="*", default=list(TABLE), choices=list(TABLE))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copying {bandwidth / 1e9:.0f} GB/s", flush=True)
    facts = []
    for name in arguments.presets:
        fact = measure(name, arguments.rounds, bandwidth)
        print(line(fact), flush=True)
        facts.append(fact)
        if arguments.json:  # each time: a later model may not come to its end
            arguments.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()


def measure(name: str, rounds: int, bandwidth: float) -> dict[str, Any]:
    """One row."""
    spec = preset(name).spec
    free, _ = torch.cuda.mem_get_info()
    needed = 2 * parameters(spec).total
    if needed > 0.95 * free:
        says = f"{needed / 1e9:.0f} GB of weights do not fit into {free / 1e9:.0f} GB"
        return {"title": name, "says": says, "reached": None}
    torch.cuda.reset_peak_memory_stats()
    network = random_network(spec)
    engine = engine_of(network)
    answer(engine, "warm-up")
    found = [answer(engine, str(number)) for number in range(rounds)]
    step_s = statistics.median(step for _, step in found)
    memory_bytes = torch.cuda.max_memory_allocated()
    executor = cast(PagedExecutor, engine.executor)
    executor.forget_graphs()
    replay_s = replayed_s(network, executor)
    uncaptured_s = statistics.median(answer(engine, f"u{number}")[1] for number in range(rounds))
    del engine, executor
    engine = engine_of(network, invariant=True)
    answer(engine, "warm-up")
    invariant_s = statistics.median(answer(engine, f"i{number}")[1] for number in range(rounds))
    floor_s = active_bytes(spec) / bandwidth
    fraction = floor_s / step_s
    return {
        "title": name,
        "latency_ms": 1e3 * statistics.median(whole for whole, _ in found),
        "spread_ms": [1e3 * min(w for w, _ in found), 1e3 * max(w for w, _ in found)],
        "step_ms": 1e3 * step_s,
        "invariant": invariant_s / step_s,
        "uncaptured": uncaptured_s / step_s,
        "memory_mb": memory_bytes / 2**20,
        "fraction": fraction,
        "replay_ms": 1e3 * replay_s,
        "replay_fraction": floor_s / replay_s,
        "reached": fraction >= GOAL,
    }


def engine_of(network: GPT, *, invariant: bool = False) -> Engine:
    """For one sequence."""
    executors = gpu.executors(network, invariant=invariant)
    model = LoadedModel(network, Letters(), {}, Path(), executors)
    return model.engine(EngineConfig(max_batch_size=1, prefix_cache=False))  # all prompts are one


def random_network(spec: ModelSpec) -> GPT:
    """A model on the GPU, each weight drawn there."""
    with torch.device("meta"):
        network = GPT(spec, compute_dtype=torch.bfloat16)
    for name, parameter in list(network.named_parameters()):
        dtype = kept_dtype(name, torch.bfloat16)
        values = torch.empty(parameter.shape, dtype=dtype, device=GPU)
        if name.endswith("bias"):
            values.zero_()
        else:
            values.fill_(1.0) if "norm" in name else values.normal_(0, 0.02)
        owner, _, attribute = name.rpartition(".")
        setattr(
            network.get_submodule(owner), attribute, torch.nn.Parameter(values, requires_grad=False)
        )
    return network.eval()


def answer(engine: Engine, request_id: str) -> tuple[float, float]:
    """Seconds of the whole answer and of one decoding step."""
    sampling = SamplingParams(max_new_tokens=OUTPUT, temperature=0, ignore_end=True)
    engine.add(Request(request_id, tuple(range(100, 100 + INPUT)), sampling))
    ends = [_now_s()]
    while engine.has_work:
        engine.step()
        ends.append(_now_s())
    steps = [later - earlier for earlier, later in pairwise(ends[1:])]  # the first is the prompt's
    return ends[-1] - ends[0], statistics.median(steps)


@torch.inference_mode()
def replayed_s(network: GPT, executor: PagedExecutor, count: int = 50) -> float:
    """Seconds of a captured step amid an answer, by the GPU's clock."""
    graphs = DecodingGraphs(network, executor.cache, 1)
    row_3R = torch.tensor([[100], [INPUT + OUTPUT // 2], [0]], device=GPU)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graphs.run(row_3R)  # captures it
    graphs.run(row_3R)
    began.record()
    for _ in range(count):
        graphs.run(row_3R)
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3 / count


def copy_bandwidth() -> float:
    """Bytes read and written per second when memory is copied within the GPU."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=GPU)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        began_s = _now_s()
        target.copy_(source)
        seconds.append(_now_s() - began_s)
    return 2 * COPY_BYTES / min(seconds)


def line(fact: dict[str, Any]) -> str:
    """One row for people."""
    described = TABLE[fact["title"]]
    gpus = f"{described.gpus} A100: {described.latency_ms:.0f} ms, {described.memory_mb} MB"
    if "latency_ms" not in fact:
        return f"{fact['title']:<14}{fact['says']}   ({gpus})"
    low, high = fact["spread_ms"]
    return (
        f"{fact['title']:<14}{fact['latency_ms']:8.1f} ms ({low:.1f} to {high:.1f}), a step "
        f"{fact['step_ms']:.2f} ms, {fact['memory_mb']:.0f} MB, {fact['fraction']:.2f} of "
        f"bandwidth {'yes' if fact['reached'] else 'NO'} ({fact['replay_fraction']:.2f} on the "
        f"GPU), invariant {fact['invariant']:.2f} times, uncaptured {fact['uncaptured']:.2f} times"
        f"   ({gpus})"
    )


def _now_s() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
