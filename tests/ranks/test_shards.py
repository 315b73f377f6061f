"""A model on several ranks, served: the bits of one process, whatever the layout."""

from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import gptmoe
from cluster.messages import Drain, Step
from cluster.shards.executor import ShardsExecutor
from cluster.shards.links import Links, groups_of
from cluster.shards.routes import neighbours, route_of
from cluster.shards.sockets import connect
from cluster.shards.step_loop import run_steps
from gptmoe.checkpoint import open_checkpoint
from gptmoe.errors import ClusterError
from gptmoe.generate.engine import Engine
from gptmoe.generate.executor import Executor
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.plan import StepPlan
from gptmoe.generate.request import Request
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.model.routers import ROUTERS
from gptmoe.model.spec import RouterKind, RouterSpec
from gptmoe.shard.parts import ExpertSpan, Part, arrange, layout_of
from gptmoe.shard.shard import Shard
from gptmoe.stored import spec_of
from tests import small_model
from tests.ranks.pool import GROUP_TIMEOUT, RankPool

ENGINE = EngineConfig(max_batch_size=8, token_budget=48)
LONG = "春风又绿江南岸，明月何时照我还。" * 6
PROMPTS = [LONG, "明月", "白日依山尽，黄河入海流。", "千山鸟飞绝", LONG + "春", LONG + "江"]
TWO_ANSWERS = 5
"""The last prompt, whose beginning is in the cache, has two."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep": {"dp": 2, "ep": 2},
    "dp": {"dp": 2},
    "pp": {"pp": 2},
    "tp": {"tp": 2},
    "pp, ep": {"pp": 2, "dp": 2, "ep": 2},
    "dp, ep": {"dp": 4, "ep": 2},
    "ep 4": {"dp": 4, "ep": 4},
    "tp, ep": {"tp": 2, "ep": 2},
    "tp, dp, ep": {"tp": 2, "dp": 2, "ep": 4},
    "pp 4": {"pp": 4},
    "expert ranks": {"ep": 2, "expert_ranks": 2},
    "dp, expert ranks": {"dp": 2, "ep": 2, "expert_ranks": 2},
    "two copies": {"dp": 2, "ep": 1, "expert_ranks": 2},
    "pp, expert ranks": {"pp": 2, "ep": 1, "expert_ranks": 1},
    "hot": {"ep": 2, "expert_ranks": 2, "hot": (ExpertSpan(1, 1, 3), ExpertSpan(3, 6, 7))},
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Four ranks and the engine's."""
    with RankPool(5) as pool:
        yield pool


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.write(tmp_path_factory.mktemp("run"))


class Recording:
    """An executor that keeps the scores of each step; with banks as another may have."""

    def __init__(self, inner: Executor, banks: int) -> None:
        self.inner = inner
        self.banks = banks
        self.scores: list[torch.Tensor] = []
        self.copies = 0

    def keep(self, versions: Set[int]) -> None:
        self.inner.keep(versions)

    def run(self, plan: StepPlan, tokens: Any) -> torch.Tensor:
        self.copies += len(plan.copies)
        self.scores.append(self.inner.run(plan, tokens))
        return self.scores[-1]


class Generated(NamedTuple):
    """Tokens by prompt, and the scores of each step."""

    tokens: dict[str, list[int]]
    scores: list[torch.Tensor]


def generate(executor: Executor, banks: int) -> Generated:
    """Answer the prompts, which come one after the other."""
    recording, tokenizer = Recording(executor, banks), small_model.tokenizer()
    engine = Engine(recording, tokenizer, 320, ENGINE)
    tokens: dict[str, list[int]] = {}
    waiting = list(enumerate(PROMPTS))
    while waiting or engine.has_work:
        if waiting:
            index, prompt = waiting.pop(0)
            sampling = SamplingParams(
                max_new_tokens=6 + 2 * index,
                temperature=index % 2,
                seed=index,
                ignore_end=True,
                n=1 + (index == TWO_ANSWERS),
            )
            engine.add(Request(str(index), tuple(tokenizer.encode(prompt)), sampling))
        for delta in engine.step():
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    assert recording.copies, "a beginning, and the second answer's"
    return Generated(tokens, recording.scores)


def serve(rank: int, parts: Sequence[Part], checkpoint: Path, dtype: torch.dtype) -> Any:
    """What a rank does: the last one is the engine's."""
    stored = open_checkpoint(checkpoint)
    spec = spec_of(stored)
    groups = groups_of(parts, rank, GROUP_TIMEOUT)
    store = dist.distributed_c10d._get_default_store()
    ways = neighbours(parts, rank)
    limit_s = GROUP_TIMEOUT.total_seconds()
    sockets = connect(store, rank, "127.0.0.1", ways, timeout_s=limit_s, within_s=limit_s)
    line = Links(groups.everyone, sockets)
    if rank == len(parts):
        executor = ShardsExecutor(parts, line, 1, spec.vocab_size, dtype)
        executor.beat()
        assert executor.banks == layout_of(parts).dp
        result = generate(executor, executor.banks)
        for shard_rank in range(len(parts)):
            if route_of(parts, shard_rank).source == rank:
                line.send(Drain(epoch=1, sequence=1), shard_rank)
        line.wait()
        line.close()
        return result
    shard = Shard(spec, parts, rank, ENGINE.max_batch_size, dtype, torch.device("cpu"))
    shard.load(stored, version=0)
    shard.connect(groups.rows, groups.slices)
    route, steps = route_of(parts, rank), 0

    def accept(step: Step) -> bool:
        nonlocal steps
        steps += 1
        assert (step.epoch, step.sequence) == (1, steps)
        return True

    try:
        run_steps(shard, line, route, accept)
    except ClusterError as error:
        if "Drain" not in str(error):
            raise
    if route.target != len(parts):
        line.send(Drain(epoch=1, sequence=1), route.target)
    line.wait()
    line.close()
    return shard.load_of


EXACT = [name for name, layout in LAYOUTS.items() if "tp" not in layout]


def alone_and_served(
    pool: RankPool, checkpoint: Path, name: str, dtype: str = "float32"
) -> tuple[Generated, Generated]:
    """What one process generates, and what a layout's ranks do."""
    model = gptmoe.load(checkpoint, dtype=dtype)
    parts = arrange(model.spec, **LAYOUTS[name])
    alone = generate(model.engine(ENGINE).executor, layout_of(parts).dp)
    *_, served = pool.run(len(parts) + 1, serve, parts, checkpoint, getattr(torch, dtype))
    return alone, served


def check_equal_bits(alone: Generated, served: Generated) -> None:
    assert served.tokens == alone.tokens
    assert len(served.scores) == len(alone.scores)
    assert all(map(torch.equal, served.scores, alone.scores))


def check_equal_text(alone: Generated, served: Generated) -> None:
    """And scores that differ by no more than the order of a sum."""
    assert served.tokens == alone.tokens
    ours, theirs = torch.cat(served.scores), torch.cat(alone.scores)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EXACT)
def test_products_that_keep_their_shape_have_the_bits_of_one_process(
    pool: RankPool, checkpoint: Path, name: str, dtype: str
) -> None:
    alone, served = alone_and_served(pool, checkpoint, name, dtype)
    assert sum(map(len, alone.tokens.values())) == 6 + 8 + 10 + 12 + 14 + 2 * 16
    assert sum(map(len, alone.scores)) == sum(map(len, alone.tokens.values())) - 1, (
        "both answers draw from one row"
    )
    check_equal_bits(alone, served)


@pytest.mark.parametrize("name", ["ep", "pp, ep", "hot"])
@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if kind != "switch"])
def test_every_router_is_served_with_the_bits_of_one_process(
    pool: RankPool, tmp_path: Path, name: str, kind: RouterKind
) -> None:
    checkpoint = small_model.write(tmp_path, router=RouterSpec(kind=kind))
    check_equal_bits(*alone_and_served(pool, checkpoint, name))


@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - set(EXACT)))
def test_split_sums_differ_by_rounding_and_the_text_is_the_same(
    pool: RankPool, checkpoint: Path, name: str
) -> None:
    alone, served = alone_and_served(pool, checkpoint, name)
    check_equal_text(alone, served)
    assert not all(map(torch.equal, served.scores, alone.scores)), "else no sum was split"


CHOOSING = RouterSpec(kind="expert_choice", capacity_factor=2.0)


@pytest.fixture(scope="module")
def choosing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts that choose, several for some tokens and none for others, and shared layers."""
    return small_model.write(tmp_path_factory.mktemp("run"), router=CHOOSING, residual_moe=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["ep", "pp, ep", "two copies", "pp, expert ranks", "hot"])
def test_several_experts_a_token_and_shared_layers_have_the_bits_of_one_process(
    pool: RankPool, choosing: Path, name: str, dtype: str
) -> None:
    check_equal_bits(*alone_and_served(pool, choosing, name, dtype))


@pytest.mark.parametrize("name", ["tp", "tp, ep"])
def test_split_shared_layers_give_the_same_text(pool: RankPool, choosing: Path, name: str) -> None:
    check_equal_text(*alone_and_served(pool, choosing, name))


def test_each_expert_counts_its_rows_and_hot_ones_share_them(
    pool: RankPool, checkpoint: Path
) -> None:
    spec = spec_of(open_checkpoint(checkpoint))
    rows = {}
    for name in ("expert ranks", "hot"):
        parts = arrange(spec, **LAYOUTS[name])
        *loads, _ = pool.run(len(parts) + 1, serve, parts, checkpoint, torch.float32)
        rows[name] = [load[1][1] for load in loads]
    alone, shared = rows["expert ranks"], rows["hot"]
    assert alone[0] == alone[2] == 0 < alone[1]
    assert shared[0] == 0
    assert sum(shared) == sum(alone)
    assert abs(shared[1] - shared[2]) <= 0.5 * sum(shared)
