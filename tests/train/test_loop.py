"""The loop without Ray: what a step's numbers mean, and what they must not depend on."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gptmoe import data
from gptmoe.checkpoint import Box
from gptmoe.errors import ConfigError
from gptmoe.metrics import CATALOGUE
from gptmoe.model.moe import MoE
from gptmoe.model.routing import Statistics
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.model.transformer import GPT
from gptmoe.parallel.apply import build
from gptmoe.parallel.layout import Layout
from gptmoe.parallel.loss_scale import LossScale
from gptmoe.parallel.mesh import Mesh, single
from gptmoe.parallel.optimizer import OptimizerSpec
from gptmoe.parallel.pipeline import Pipeline
from gptmoe.parallel.updater import PlainUpdater
from gptmoe.text import load_tokenizer
from tests.train.conftest import TOKENIZER
from train.loop import Scaler, Trainer, run_steps
from train.passes import StepSettings
from train.schedule import ScheduleSpec

MIXTURE = ModelSpec(
    num_layers=2,
    d_model=16,
    num_heads=2,
    d_ff=32,
    vocab_size=3072,
    max_seq_len=32,
    num_experts=(4,),
    router=RouterSpec(group_sequences=4, capacity_factor=0.8, z_loss_coef=1e-3),
    init_std=0.1,
)
DENSE = dataclasses.replace(MIXTURE, num_experts=())
PLAIN_SGD = OptimizerSpec(kind="sgd", max_grad_norm=0.0, weight_decay=0.0)
"""With rate 1 the weights change by exactly the gradient."""


def constant(rate: float) -> ScheduleSpec:
    return ScheduleSpec(
        kind="constant", learning_rate=rate, min_learning_rate=0.0, warmup_steps=0, horizon_steps=1
    )


def trainer(
    folder: Path,
    spec: ModelSpec = MIXTURE,
    *,
    optimizer: OptimizerSpec = PLAIN_SGD,
    rate: float = 1.0,
    dtype: torch.dtype = torch.float64,
    mesh: Mesh | None = None,
    **settings: Any,
) -> Trainer:
    """A trainer of one process that takes 16 sequences of 24 tokens a step."""
    model = build(spec, single(), torch.device("cpu"), dtype=dtype, seed=1)
    sizes = {"microbatch_size": 16, "first_sequence": 0, "num_sequences": 16} | settings
    return Trainer(
        pipeline=Pipeline(model.train(), mesh or single()),
        updater=PlainUpdater(model, single(), optimizer),
        samples=data.open_samples(folder, "train", 24, seed=0),
        settings=StepSettings(
            seed=0, seq_len=24, batch_sequences=16, schedule=constant(rate), **sizes
        ),
    )


@pytest.fixture(scope="module")
def examples(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples with targets, prepared for finetuning."""
    folder = tmp_path_factory.mktemp("examples") / "pairs"
    data.prepare([pairs], load_tokenizer(TOKENIZER), folder, kind="finetune")
    return folder


def weights(model: GPT) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_loss_falls(prepared: Path) -> None:
    learner = trainer(prepared, dtype=torch.float32, optimizer=OptimizerSpec(), rate=1e-2)
    losses = [learner.step(step)["loss"] for step in range(1, 13)]
    assert losses[0] == pytest.approx(math.log(3072), rel=0.1)
    assert losses[-1] < losses[0] - 0.6


@pytest.mark.parametrize("corpus", ["prepared", "examples"])
def test_accumulation_changes_neither_loss_nor_gradient_nor_drops(
    corpus: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(corpus)
    start = weights(trainer(folder).model)
    seen = []
    for microbatch_size in (16, 8, 4):
        learner = trainer(folder, microbatch_size=microbatch_size)
        seen.append((learner.step(1), start - weights(learner.model)))
    whole, gradient = seen[0]
    assert whole["dropped_ratio"] > 0.05  # type: ignore[operator]
    assert gradient.norm() == pytest.approx(whole["grad_norm"], rel=1e-12)
    for values, other in seen[1:]:
        for name in ("dropped_ratio", "expert_load", "dead_experts", "load_max_over_mean"):
            assert values[name] == whole[name]
        for name in ("loss", "lm_loss", "aux_loss", "z_loss", "router_entropy", "grad_norm"):
            assert values[name] == pytest.approx(whole[name], rel=1e-12)
        torch.testing.assert_close(other, gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("microbatch_size", [1, 4, 16])
def test_each_target_counts_alike_however_they_are_spread(
    examples: Path, microbatch_size: int
) -> None:
    learner = trainer(examples, DENSE, microbatch_size=microbatch_size)
    batch = learner.samples.batch(0, 16)
    counts = batch.weight_BT.reshape(-1, microbatch_size, 24).sum((1, 2))
    assert microbatch_size == 16 or counts.min() < counts.max()
    model = build(DENSE, single(), torch.device("cpu"), dtype=torch.float64, seed=1)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(16):  # one by one, cut before the padding: no mask, no batch, no microbatch
        length = batch.valid_BT[row].sum()
        tokens, labels, weight = (
            torch.from_numpy(array[row, :length])
            for array in (batch.tokens_BT, batch.labels_BT, batch.weight_BT)
        )
        logits_TV = model.logits(model(tokens[None]).hidden_BTD)[0]
        total = total + (F.cross_entropy(logits_TV, labels, reduction="none") * weight).sum()
    loss = total / batch.weight_BT.sum()
    loss.backward()
    grads = [parameter.grad for parameter in model.parameters()]
    gradient = torch.cat([grad.flatten() for grad in grads if grad is not None])

    before = weights(learner.model)
    values = learner.step(1)
    assert values["loss"] == values["lm_loss"] == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(before - weights(learner.model), gradient, rtol=1e-9, atol=1e-13)


def test_slices_of_a_batch_add_up_to_it(prepared: Path) -> None:
    whole = trainer(prepared)
    before = weights(whole.model)
    values = whole.step(1)
    gradients, losses = [], []
    for first in (0, 8):  # as two ranks, each told the labels of both
        mesh = _OneOfTwo(Layout(), rank=0)
        part = trainer(
            prepared, mesh=mesh, microbatch_size=8, first_sequence=first, num_sequences=8
        )
        losses.append(part.step(1)["loss"])
        gradients.append(before - weights(part.model))
    assert sum(losses) == pytest.approx(values["loss"], rel=1e-12)
    torch.testing.assert_close(
        gradients[0] + gradients[1], before - weights(whole.model), rtol=1e-9, atol=1e-13
    )


class _OneOfTwo(Mesh):
    """As if another rank had as many labels; what else is summed stays this rank's."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor if tensor.ndim == 0 else tensor


DROPPING = dataclasses.replace(MIXTURE, dropout=0.3)


def resumed(learner: Trainer, folder: Path) -> Trainer:
    """A new trainer with the state of another, as it comes from a checkpoint."""
    copy = trainer(folder, DROPPING, dtype=torch.float32, optimizer=OptimizerSpec(), rate=1e-2)
    copy.model.load_state_dict(learner.model.state_dict())
    pieces = {piece.name: piece.tensor.clone() for piece in learner.updater.state_pieces()}
    copy.updater.load_state(lambda name, box: pieces[name][box.slices(Box.whole(box.shape))])
    return copy


def test_a_resumed_run_repeats_its_dropout_to_the_bit(prepared: Path) -> None:
    learner = trainer(prepared, DROPPING, dtype=torch.float32, optimizer=OptimizerSpec(), rate=1e-2)
    for step in (1, 2):
        learner.step(step)
    again = resumed(learner, prepared)
    torch.manual_seed(12345)  # a resumed process has another history
    for step in (3, 4):
        assert again.step(step)["loss"] == learner.step(step)["loss"]
    assert torch.equal(weights(again.model), weights(learner.model))


def test_dropout_differs_between_steps_slices_and_seeds(prepared: Path) -> None:
    def loss(step: int = 1, **settings: Any) -> object:
        learner = trainer(prepared, DROPPING)
        fixed = dataclasses.replace(learner.settings, **settings)
        order = data.open_samples(prepared, "validation", 24, seed=0)  # the same in each epoch
        same = dataclasses.replace(learner, settings=fixed, samples=Repeated(order))
        return same.step(step)["lm_loss"]

    losses = [loss(), loss(step=2), loss(first_sequence=16), loss(seed=1)]
    assert len(set(losses)) == 4
    assert loss() == losses[0]


class Repeated(data.LineSamples):
    """The same samples whatever is asked for."""

    def __init__(self, samples: data.Samples) -> None:
        self._samples = samples
        self.num_samples = samples.num_samples

    def batch(self, first: int, count: int) -> data.Batch:
        return self._samples.batch(0, count)


def test_a_step_reports_what_the_catalogue_knows(prepared: Path) -> None:
    learner = trainer(prepared, rate=1e-3)
    values = learner.step(3)
    assert set(values) <= set(CATALOGUE)
    parts = [values[name] for name in ("lm_loss", "aux_loss", "z_loss", "margin_loss")]
    assert values["loss"] == pytest.approx(math.fsum(parts), rel=1e-12)  # type: ignore[arg-type]
    assert (values["tokens"], values["samples"]) == (3 * 16 * 24, 48)
    assert values["learning_rate"] == 1e-3
    assert sum(values["expert_load"]) == 16 * 24  # type: ignore[arg-type]
    assert not {"aux_loss", "expert_load"} & set(trainer(prepared, DENSE).step(1))


def test_routers_learn_from_the_whole_batch_once_a_step(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = trainer(prepared, microbatch_size=4)
    seen: list[Statistics] = []
    moe = learner.model.layers[1].ffn
    assert isinstance(moe, MoE)
    monkeypatch.setattr(moe.router, "update", seen.append)
    learner.step(1)
    assert [int(statistics.tokens) for statistics in seen] == [16 * 24]


def test_a_diverged_run_stops_before_it_is_saved(prepared: Path) -> None:
    learner = trainer(prepared, rate=1e-3)
    with torch.no_grad():
        learner.model.norm.weight.fill_(math.inf)
    with pytest.raises(
        ConfigError, match=r"diverged at step 7: .*lower schedule.learning_rate \(this .* 0.001\)"
    ):
        learner.step(7)


class _Notes:
    """A recorder that keeps what it is given."""

    def __init__(self, notes: list[object]) -> None:
        self.notes = notes

    def record(self, step: int, **values: object) -> None:
        self.notes.append((step, values["samples"]))

    def close(self) -> None:
        """Nothing to do."""


@pytest.mark.parametrize(("done", "steps"), [(0, [1, 2, 3]), (2, [3]), (3, []), (5, [])])
def test_the_loop_takes_the_steps_that_are_left_and_records_first(
    prepared: Path, done: int, steps: list[int]
) -> None:
    notes: list[object] = []
    note: Callable[[int], None] = notes.append
    learner = trainer(prepared, rate=1e-3)
    run_steps(learner, done=done, max_steps=3, recorders=[_Notes(notes)], after_step=note)
    assert notes == [item for step in steps for item in ((step, 16 * step), step)]


def scaled(folder: Path, value: float) -> Trainer:
    learner = trainer(folder, dtype=torch.float32, optimizer=OptimizerSpec(), rate=1e-3)
    return dataclasses.replace(learner, scaler=Scaler(LossScale(value=value, grow_after=2)))


def test_a_power_of_two_as_loss_scale_changes_no_bit(prepared: Path) -> None:
    plain = trainer(prepared, dtype=torch.float32, optimizer=OptimizerSpec(), rate=1e-3)
    learner = scaled(prepared, 2.0**10)
    for step in (1, 2, 3):
        ours, theirs = learner.step(step), plain.step(step)
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
    assert torch.equal(weights(learner.model), weights(plain.model))
    assert learner.scaler.state == LossScale(value=2.0**11, clean_steps=1, grow_after=2)


def test_a_step_that_overflows_is_left_out_and_the_scale_halved(prepared: Path) -> None:
    learner, plain = scaled(prepared, 1024.0), scaled(prepared, 512.0)
    before = weights(learner.model)
    handle = learner.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    values = learner.step(1)
    handle.remove()
    assert (values["overflow"], values["loss_scale"]) == (1.0, 1024.0)
    assert "grad_norm" not in values
    assert torch.equal(weights(learner.model), before)
    assert all(parameter.grad is None for parameter in learner.model.parameters())
    assert learner.scaler.state == LossScale(value=512.0, grow_after=2)
    plain_values = plain.step(2)
    assert learner.step(2)["grad_norm"] == plain_values["grad_norm"]
    assert torch.equal(weights(learner.model), weights(plain.model))


def test_what_overflows_without_a_scale_has_diverged(prepared: Path) -> None:
    learner = scaled(prepared, 1.0)
    learner.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(ConfigError, match="training diverged at step 1"):
        learner.step(1)
