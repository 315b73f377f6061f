"""ZeRO 1, 2 and 3 against one process: numbers, norm, state, resume, in each layout."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from gptmoe.checkpoint import Box, Checkpoint, open_checkpoint, save
from gptmoe.data import Batch
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.model.transformer import GPT
from gptmoe.parallel import mesh as meshes
from gptmoe.parallel.apply import build
from gptmoe.parallel.layout import Layout
from gptmoe.parallel.optimizer import OptimizerSpec
from gptmoe.parallel.ownership import owned_parameters, weight_pieces
from gptmoe.parallel.pipeline import Pipeline
from gptmoe.parallel.updater import PlainUpdater
from tests.ranks.pool import RankPool
from train.loop import Trainer
from train.passes import StepSettings
from train.schedule import ScheduleSpec
from train.zero import ZeroUpdater

MOE = ModelSpec(
    num_layers=4,
    d_model=20,
    num_heads=4,
    d_ff=52,  # no size divides evenly over four ranks with its neighbours: fragments cut rows
    vocab_size=67,
    max_seq_len=16,
    num_experts=(4, 8),
    router=RouterSpec(group_sequences=2),
    init_std=0.1,
)
DENSE = ModelSpec(
    num_layers=2, d_model=20, num_heads=4, d_ff=52, vocab_size=67, max_seq_len=16, init_std=0.1
)
SGD = OptimizerSpec(kind="sgd", max_grad_norm=0.5)  # below every norm here: clipping is active
ADAMW = OptimizerSpec(max_grad_norm=0.5)
RATE = {"sgd": 0.1, "adamw": 3e-3}
STEPS = 6

ONE = Layout(dp=1)
LAYOUTS = {
    "one": (ONE, MOE),
    "dense dp2": (Layout(dp=2), DENSE),
    "dp2": (Layout(dp=2), MOE),
    "dp4": (Layout(dp=4), MOE),
    "dp2 ep2": (Layout(dp=2, ep=2), MOE),
    "dp4 ep2": (Layout(dp=4, ep=2), MOE),
    "dp4 ep4": (Layout(dp=4, ep=4), MOE),
    "dp2 tp2": (Layout(dp=2, tp=2), MOE),
    "dp2 tp2 ep4": (Layout(dp=2, tp=2, ep=4), MOE),
    "tp2 pp2 ep2": (Layout(tp=2, pp=2, ep=2), MOE),
    "dp2 tp2 ep2, experts cut": (Layout(dp=2, tp=2, ep=2, expert_tp=True), MOE),
    "dp2 pp2, two chunks": (Layout(dp=2, pp=2, chunks=2), MOE),
    "pp4": (Layout(pp=4), MOE),
}
each_layout = pytest.mark.parametrize(("layout", "spec"), LAYOUTS.values(), ids=LAYOUTS)


class RandomSamples:
    """Sequences of random tokens, a function of the sample index."""

    num_samples = 1000

    def batch(self, first: int, count: int) -> Batch:
        rows = [
            np.random.default_rng(index).integers(0, 67, 17)
            for index in range(first, first + count)
        ]
        token_BS = np.stack(rows)
        all_BT = np.ones((count, 16), bool)
        return Batch(token_BS[:, :-1], token_BS[:, 1:], all_BT, all_BT)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Steps first..last of a training of 16 sequences a step, from and to a checkpoint."""

    layout: Layout
    spec: ModelSpec
    optimizer: OptimizerSpec
    updater: Callable[..., PlainUpdater | ZeroUpdater] = ZeroUpdater
    first: int = 1
    last: int = STEPS
    source: Path | None = None
    target: Path | None = None


@dataclass(frozen=True)
class Seen:
    """What each step showed."""

    loss: list[float]
    norm: list[float]


def train(rank: int, run: Run) -> Seen:
    """One rank of a run; the test's own process may be the only one."""
    mesh = meshes.join(run.layout, rank)
    model = build(run.spec, mesh, torch.device("cpu"), seed=5)
    stored = open_checkpoint(run.source) if run.source else None
    if stored:
        with torch.no_grad():
            for owned in owned_parameters(model, mesh.layout, rank):
                for box, part in owned.parts(owned.parameter):
                    part.copy_(stored.read(owned.name, box))
    updater = run.updater(model, mesh, run.optimizer)
    if stored:
        updater.load_state(lambda name, box: stored.read(name, box, "optimizer"))
    trainer = Trainer(
        pipeline=Pipeline(model, mesh),
        updater=updater,
        samples=RandomSamples(),
        settings=settings(run, mesh),
    )
    steps = [trainer.step(step) for step in range(run.first, run.last + 1)]
    if run.target:
        save(
            run.target,
            rank=rank,
            world=mesh.layout.world,
            barrier=mesh.barrier,
            groups={
                "weights": weight_pieces(owned_parameters(model, mesh.layout, rank)),
                "optimizer": updater.state_pieces(),
            },
            config={},
            progress={},
        )
    return Seen([step["loss"] for step in steps], [step["grad_norm"] for step in steps])


def settings(run: Run, mesh: meshes.Mesh) -> StepSettings:
    share = 16 // run.layout.dp
    return StepSettings(
        seed=0,
        seq_len=16,
        batch_sequences=16,
        microbatch_size=2,
        first_sequence=mesh.place.data * share,
        num_sequences=share,
        pipeline="interleaved" if run.layout.chunks > 1 else "1f1b",
        schedule=ScheduleSpec(
            kind="constant",
            learning_rate=RATE[run.optimizer.kind],
            min_learning_rate=0.0,
            warmup_steps=0,
            horizon_steps=STEPS,
        ),
    )


def zero_2(model: GPT, mesh: meshes.Mesh, optimizer: OptimizerSpec) -> ZeroUpdater:
    """ZeRO 2; a function of a module, since it travels by name."""
    return ZeroUpdater(model, mesh, optimizer, stage=2)


def on_ranks(pool: RankPool, run: Run) -> Seen:
    """The run on a process for each rank; all ranks see the same."""
    seen = pool.run(run.layout.world, train, run)
    assert all(other == seen[0] for other in seen)
    return seen[0]


def assert_same(one: Checkpoint, other: Checkpoint, group: str) -> None:
    """Not a bit differs."""
    assert set(one.names(group)) == set(other.names(group)) != set()
    for name in one.names(group):
        assert torch.equal(one.read(name, None, group), other.read(name, None, group)), name


OneProcess = Callable[[ModelSpec, OptimizerSpec], tuple[Seen, Path]]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> OneProcess:
    """What the plain updater does in one process, and its checkpoint: done once for all layouts."""

    @cache
    def done(spec: ModelSpec, optimizer: OptimizerSpec) -> tuple[Seen, Path]:
        target = tmp_path_factory.mktemp("plain") / "saved"
        plain = Run(layout=ONE, spec=spec, optimizer=optimizer, updater=PlainUpdater, target=target)
        return train(0, plain), target

    return done


@each_layout
def test_sgd_takes_the_steps_of_one_process(
    pool: RankPool, one_process: OneProcess, tmp_path: Path, layout: Layout, spec: ModelSpec
) -> None:
    expected, saved = one_process(spec, SGD)
    assert min(expected.norm) > SGD.max_grad_norm
    found = on_ranks(pool, Run(layout=layout, spec=spec, optimizer=SGD, target=tmp_path / "zero"))
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.norm == pytest.approx(expected.norm, rel=1e-6)
    one, other = open_checkpoint(saved), open_checkpoint(tmp_path / "zero")
    for name in one.names():
        difference = (one.read(name) - other.read(name)).norm()
        assert difference <= 1e-5 * one.read(name).norm(), name


@pytest.mark.parametrize("name", ["one", "dense dp2", "dp2 ep2", "dp4 ep2", "dp2 tp2 ep4"])
def test_zero_2_has_the_numbers_of_one_process(
    pool: RankPool, one_process: OneProcess, name: str
) -> None:
    layout, spec = LAYOUTS[name]
    for optimizer in (SGD, ADAMW):
        expected, _ = one_process(spec, optimizer)
        run = Run(layout=layout, spec=spec, optimizer=optimizer, updater=zero_2)
        found = on_ranks(pool, run)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.norm == pytest.approx(expected.norm, rel=1e-5)


@each_layout
def test_adamw_has_the_losses_of_one_process(
    pool: RankPool, one_process: OneProcess, layout: Layout, spec: ModelSpec
) -> None:
    expected, _ = one_process(spec, ADAMW)
    found = on_ranks(pool, Run(layout=layout, spec=spec, optimizer=ADAMW))
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


def test_two_ranks_have_the_plain_updaters_bits(pool: RankPool) -> None:
    """A sum of two has one order, and these sizes leave no tail that is computed apart."""
    spec = replace(MOE, d_model=32, d_ff=64, vocab_size=96)
    zero = Run(layout=Layout(dp=2, ep=2), spec=spec, optimizer=ADAMW)
    plain = replace(zero, updater=PlainUpdater)
    assert on_ranks(pool, zero).loss == on_ranks(pool, plain).loss


def zero_3(layout: Layout, **given: object) -> Run:
    """Shards are the layout's; the step is the plain one."""
    sharded = replace(layout, sharded=True)
    return Run(layout=sharded, spec=DENSE, optimizer=ADAMW, updater=PlainUpdater, **given)


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_zero_3_has_the_numbers_of_one_process(
    pool: RankPool, one_process: OneProcess, dp: int
) -> None:
    for optimizer in (SGD, ADAMW):
        expected, _ = one_process(DENSE, optimizer)
        found = on_ranks(pool, replace(zero_3(Layout(dp=dp)), optimizer=optimizer))
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.norm == pytest.approx(expected.norm, rel=1e-5)


def norm_of_ones(
    rank: int, layout: Layout, spec: ModelSpec, make: Callable[..., PlainUpdater | ZeroUpdater]
) -> float:
    """What each holder of a parameter contributes adds up to ones."""
    mesh = meshes.join(layout, rank)
    model = build(spec, mesh, torch.device("cpu"), seed=5)
    updater = make(model, mesh, SGD)
    for owned in owned_parameters(model, layout, rank):
        shares = owned.cut.copies
        if owned.cut.is_partial:
            shares *= layout.tp
        if owned.cut.is_tied:
            shares *= 2
        owned.parameter.grad = torch.full_like(owned.parameter, 1 / shares)
    return updater.step(0.0)


@each_layout
@pytest.mark.parametrize("make", [PlainUpdater, ZeroUpdater])
def test_norm_of_ones_counts_each_parameter_once(
    pool: RankPool,
    layout: Layout,
    spec: ModelSpec,
    make: Callable[..., PlainUpdater | ZeroUpdater],
) -> None:
    whole = build(spec, meshes.single(), torch.device("meta"), seed=None)
    count = sum(parameter.numel() for parameter in whole.parameters())
    for norm in pool.run(layout.world, norm_of_ones, layout, spec, make):
        assert norm == pytest.approx(math.sqrt(count), rel=1e-6)


def test_norm_of_ones_counts_each_shard_once(pool: RankPool) -> None:
    layout = Layout(dp=4, sharded=True)
    whole = build(DENSE, meshes.single(), torch.device("meta"), seed=None)
    count = sum(parameter.numel() for parameter in whole.parameters())
    for norm in pool.run(4, norm_of_ones, layout, DENSE, PlainUpdater):
        assert norm == pytest.approx(math.sqrt(count), rel=1e-6)


def step_over_an_infinity(
    rank: int, layout: Layout, make: Callable[..., PlainUpdater | ZeroUpdater]
) -> tuple[list[float], list[bool]]:
    """Norms of a step with an infinity on one rank and of one without; whether weights moved."""
    mesh = meshes.join(layout, rank)
    model = build(MOE, mesh, torch.device("cpu"), seed=5)
    updater = make(model, mesh, SGD)
    norms, moved = [], []
    for infinite in (True, False):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 4.0)
        if infinite and rank == 1:
            next(iter(model.parameters())).grad[0] = math.inf
        norms.append(updater.step(0.1, loss_scale=4.0))
        pairs = zip(before, model.parameters(), strict=True)
        moved.append(any(not torch.equal(old, new) for old, new in pairs))
    return norms, moved


@pytest.mark.parametrize("layout", [Layout(dp=2, ep=2), Layout(tp=2, pp=2)], ids=str)
@pytest.mark.parametrize("make", [PlainUpdater, ZeroUpdater])
def test_an_infinity_anywhere_leaves_the_step_out_everywhere(
    pool: RankPool, layout: Layout, make: Callable[..., PlainUpdater | ZeroUpdater]
) -> None:
    for norms, moved in pool.run(layout.world, step_over_an_infinity, layout, make):
        assert norms[0] == math.inf
        assert 0 < norms[1] < math.inf
        assert moved == [False, True]


def step_with_gradients_on_one_rank(rank: int, layout: Layout) -> float:
    mesh = meshes.join(layout, rank)
    model = build(MOE, mesh, torch.device("cpu"), seed=5)
    updater = ZeroUpdater(model, mesh, SGD)
    if rank == 1:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    return updater.step(0.1)


def test_ranks_without_gradients_take_part(pool: RankPool) -> None:
    norms = pool.run(4, step_with_gradients_on_one_rank, Layout(dp=4, ep=2))
    assert norms[0] > 1
    assert norms == [norms[0]] * 4


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2, ep=2),
        Layout(dp=4, ep=2),
        Layout(dp=4),
        Layout(dp=4, ep=4),
        Layout(dp=2, tp=2, ep=4),
        Layout(dp=2, tp=2, ep=2, expert_tp=True),
        Layout(tp=2, pp=2, ep=2),
        Layout(dp=2, pp=2, chunks=2),
    ],
    ids=str,
)
def test_state_passes_to_one_plain_process_and_back_without_a_difference(
    pool: RankPool, tmp_path: Path, layout: Layout
) -> None:
    here, there, back = tmp_path / "zero", tmp_path / "plain", tmp_path / "back"
    zero = Run(layout=layout, spec=MOE, optimizer=ADAMW, last=2, target=here)
    on_ranks(pool, zero)
    plain = Run(layout=ONE, spec=MOE, optimizer=ADAMW, updater=PlainUpdater, last=0)
    train(0, replace(plain, source=here, target=there))
    on_ranks(pool, replace(zero, last=0, source=there, target=back))
    for group in ("weights", "optimizer"):
        assert_same(open_checkpoint(here), open_checkpoint(there), group)
        assert_same(open_checkpoint(here), open_checkpoint(back), group)


@pytest.mark.parametrize("layout", [Layout(dp=2, ep=2), Layout(dp=4, ep=2)], ids=str)
def test_a_resumed_run_repeats_the_bits(pool: RankPool, tmp_path: Path, layout: Layout) -> None:
    def part(first: int, last: int, source: str | None, target: str) -> Seen:
        run = Run(
            layout=layout, spec=MOE, optimizer=ADAMW, first=first, last=last,
            source=tmp_path / source if source else None, target=tmp_path / target,
        )  # fmt: skip
        return on_ranks(pool, run)

    straight = part(1, 6, None, "straight")
    first, second = part(1, 3, None, "half"), part(4, 6, "half", "resumed")
    assert first.loss + second.loss == straight.loss
    assert first.norm + second.norm == straight.norm
    for group in ("weights", "optimizer"):
        assert_same(
            open_checkpoint(tmp_path / "straight"), open_checkpoint(tmp_path / "resumed"), group
        )


def test_shards_pass_to_zero_1_and_back_without_a_difference(
    pool: RankPool, tmp_path: Path
) -> None:
    here, there, back = tmp_path / "three", tmp_path / "one", tmp_path / "back"
    on_ranks(pool, zero_3(Layout(dp=4), last=2, target=here))
    stage_1 = Run(layout=Layout(dp=2), spec=DENSE, optimizer=ADAMW, last=0)
    on_ranks(pool, replace(stage_1, source=here, target=there))
    on_ranks(pool, zero_3(Layout(dp=4), last=0, source=there, target=back))
    for group in ("weights", "optimizer"):
        assert_same(open_checkpoint(here), open_checkpoint(there), group)
        assert_same(open_checkpoint(here), open_checkpoint(back), group)


def test_a_run_goes_on_in_another_layout(pool: RankPool, tmp_path: Path) -> None:
    def part(layout: Layout, **given: object) -> Seen:
        return on_ranks(pool, Run(layout=layout, spec=MOE, optimizer=ADAMW, **given))

    straight = part(Layout(dp=2, ep=2))
    part(Layout(dp=2, ep=2), last=3, target=tmp_path / "half")
    second = part(Layout(dp=4, ep=4), first=4, source=tmp_path / "half")
    assert second.loss == pytest.approx(straight.loss[3:], rel=1e-5)


def pieces_of(rank: int, layout: Layout) -> list[tuple[str, Box]]:
    mesh = meshes.join(layout, rank)
    model = build(MOE, mesh, torch.device("cpu"), seed=5)
    updater = ZeroUpdater(model, mesh, ADAMW)
    updater.step(0.1)
    return [(piece.name, piece.box) for piece in updater.state_pieces()]


def test_each_rank_writes_its_own_share(pool: RankPool) -> None:
    """Nobody gathers: with four ranks each writes a quarter of the moments, padding aside."""
    shares = [
        sum(box.volume for name, box in pieces if name.startswith("exp_avg/"))
        for pieces in pool.run(4, pieces_of, Layout(dp=4, ep=2))
    ]
    assert max(shares) < 1.02 * sum(shares) / 4
