"""A group of shards that writes eight texts while something happens to it."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import env
from cluster.shards.group import ShardGroup
from cluster.shards.muster import GroupJob
from cluster.shards.shard_actor import model_digest
from cluster.shards.supervisor import Limits
from gptmoe.generate.engine import Engine
from gptmoe.generate.executor import Executor
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.loaded import LoadedModel
from gptmoe.model.spec import ModelSpec
from gptmoe.shard.parts import Part
from tests.faults.nodes import Nodes

ENGINE = EngineConfig(max_batch_size=8)
PROMPTS = [
    "春风",
    "明月几时有",
    "白日依山尽",
    "千山",
    "床前明月光",
    "大江东去",
    "国破山河在",
    "红豆",
]
TOKENS = 60
HIT_AT = 20
"""The step at which something happens."""
Texts = dict[str, list[int]]
Seconds = dict[str, float]


def job(model: LoadedModel, parts: tuple[Part, ...], run: str = "test") -> GroupJob:
    return job_of(model.path, model.spec, parts, run=run)


def job_of(
    path: Path, spec: ModelSpec, parts: tuple[Part, ...], *, dtype: str = "float32", run: str
) -> GroupJob:
    return GroupJob(
        run=run,
        parts=parts,
        checkpoint=str(path),
        config_digest=model_digest(spec),
        dtype=dtype,
        vocab_size=spec.vocab_size,
        slots=8,
        num_cpus=1,
        threads=1,
        start_s=60.0,
        limits=Limits(silent_s=2.0, wait_s=60.0),
    )


def write(
    executor: Executor,
    model: LoadedModel,
    hit: Callable[[Engine], None] = lambda engine: None,
    version: int = 0,
    moved: Callable[[], None] = lambda: None,
) -> Texts:
    """All texts at once, half of them greedy; `hit` is called once on the way, `moved` whenever
    there is something new."""
    engine = Engine(executor, model.tokenizer, model.spec.max_seq_len, ENGINE)
    engine.refresh(version)
    for index, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(
            max_new_tokens=TOKENS, temperature=0.8 * (index % 2), seed=index, ignore_end=True
        )
        engine.add(Request(str(index), tuple(model.tokenizer.encode(prompt)), sampling))
    texts: Texts = {}
    steps = 0
    while engine.has_work:
        deltas = engine.step()
        for delta in deltas:
            texts.setdefault(delta.request_id, []).extend(delta.token_ids)
        if deltas:
            moved()
            steps += 1
            if steps == HIT_AT:
                hit(engine)
    return texts


def lose(group: ShardGroup, model: LoadedModel, hit: Callable[[], None]) -> tuple[Texts, Seconds]:
    """The texts that are written while `hit` takes something away, and the phases from that order
    until the first of them moves again."""
    hit_s, moves_s = 0.0, []

    def at_hit(engine: Engine) -> None:
        nonlocal hit_s
        hit_s = time.monotonic()
        hit()

    def moved() -> None:
        moves_s.append(time.monotonic())

    texts = write(group, model, at_hit, moved=moved)
    recovery = group.recoveries[-1]
    phases = {name: recovery[f"{name}_s"] for name in ("leave", "start", "load", "meet")}
    detect_s = recovery["began_s"] - hit_s
    all_s = next(at_s for at_s in moves_s if at_s > recovery["began_s"]) - hit_s
    resume_s = all_s - detect_s - sum(phases.values())
    return texts, {"detect": detect_s, **phases, "resume": resume_s, "all": all_s}


def lose_node(nodes: Nodes, path: Path, *, spare: bool) -> dict[str, Any]:
    """What tests.faults.shards_on tells when the node under one of its two shards is killed.

    Another comes after that, or is there before (`spare`).
    """
    nodes.change("add", 2)
    variables = env.child_environment(starts_cluster=True)
    pipe = subprocess.PIPE
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        words = ["-m", "tests.faults.shards_on", nodes.address, str(path), str(out)]
        with subprocess.Popen(
            [sys.executable, *words], env=variables, stdin=pipe, stdout=pipe, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == "placed\n"
            nodes.change("add", int(spare))
            process.stdin.write("go on\n")
            process.stdin.flush()
            assert process.stdout.readline() == "now\n"
            nodes.change("oldest", 1)
            nodes.change("add", int(not spare))
            process.communicate("go on\n", timeout=120)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found
