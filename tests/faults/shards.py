"""A group of shards that writes eight texts while something happens to it."""

from collections.abc import Callable
from pathlib import Path

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
