"""The training loop. It does not know Ray: samples, updater and recorders are handed in."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptmoe.data import Samples
from gptmoe.errors import ConfigError
from gptmoe.metrics import Recorder, Value
from gptmoe.model.dropout import SampleDropout
from gptmoe.model.moe import MoE
from gptmoe.model.routing import Statistics
from gptmoe.model.transformer import GPT, Block
from gptmoe.parallel.expert import AllToAllDispatcher
from gptmoe.parallel.loss_scale import LossScale
from gptmoe.parallel.pipeline import Pipeline
from gptmoe.parallel.schedules import Action, schedule
from gptmoe.parallel.updater import Updater
from gptmoe.tensors import TensorBatch

from . import report
from .passes import LOSSES, StepSettings, Totals, TrainingPasses
from .schedule import learning_rate


@dataclass(slots=True)
class Scaler:
    """Holds the loss scale from step to step; None = the loss is not scaled."""

    state: LossScale | None

    @property
    def value(self) -> float:
        """What the loss is multiplied by."""
        return self.state.value if self.state else 1.0

    def overflowed(self, norm: float) -> bool:
        """Account for a step; whether it was left out since its scaled gradients overflowed."""
        if self.state is None or (self.state.value == 1 and not math.isfinite(norm)):
            return False
        overflow = not math.isfinite(norm)
        self.state = self.state.after(overflow=overflow)
        return overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """What a step needs; beside the model's and the updater's, its state is the loss scale."""

    pipeline: Pipeline
    updater: Updater
    samples: Samples
    settings: StepSettings
    scaler: Scaler = field(default_factory=lambda: Scaler(None))

    @property
    def model(self) -> GPT:
        """This rank's part of the model."""
        return self.pipeline.model

    def step(self, step: int) -> dict[str, Value]:
        """Take optimizer step `step`, counted from 1, and return what is to be recorded."""
        began_s = time.perf_counter()
        mesh = self.pipeline.mesh
        microbatches, data_wait_s = self._load(step)
        labels = torch.stack([batch.weight_BT.sum() for batch in microbatches]).sum().double()
        label_count = mesh.sum(labels if self.pipeline.is_last else torch.zeros_like(labels))
        passes = TrainingPasses(
            self.model,
            self.settings,
            mesh.layout,
            microbatches,
            label_count,
            self._dropout(step),
            self.scaler.value,
        )
        self.pipeline.run(
            self._actions(len(microbatches)),
            passes,
            lambda last: self.updater.microbatch_done(last=last),
        )
        losses, layers = self._account(passes.totals, label_count)
        rate = learning_rate(self.settings.schedule, step)
        scale = self.scaler.value
        grad_norm = self.updater.step(rate, scale)
        exchange_s = self._exchange_s()
        norm: dict[str, Value] = {"loss_scale": scale} if self.scaler.state else {}
        if self.scaler.overflowed(grad_norm):
            norm["overflow"] = 1.0
        else:
            _check_finite(step, rate, losses["loss"], grad_norm)
            norm["grad_norm"] = grad_norm
            self._update_routers(layers)
        return {
            **losses,
            **norm,
            "learning_rate": rate,
            **report.speed(
                self.settings.batch_sequences * self.settings.seq_len,
                began_s,
                data_wait_s,
                exchange_s,
            ),
            **report.position(
                step, self.settings.batch_sequences, self.settings.seq_len, self.samples.num_samples
            ),
        }

    def _exchange_s(self) -> float | None:
        """Seconds that a rank spent in the step's all-to-alls, in the mean; None without any."""
        mesh = self.pipeline.mesh
        if mesh.expert_group is None:
            return None
        watches = [
            module.dispatcher.watch
            for module in self.model.modules()
            if isinstance(module, MoE) and isinstance(module.dispatcher, AllToAllDispatcher)
        ]
        mine = torch.tensor(sum(watch.take() for watch in watches), dtype=torch.float64)
        return float(mesh.sum(mine)) / (mesh.layout.dp * mesh.layout.pp)

    def first_sample(self, step: int) -> int:
        """Global index of the first sample that this rank takes in a step."""
        return (step - 1) * self.settings.batch_sequences + self.settings.first_sequence

    def _load(self, step: int) -> tuple[list[TensorBatch], float]:
        settings, began_s = self.settings, time.perf_counter()
        start = self.first_sample(step)
        device = next(self.model.parameters()).device
        size = settings.microbatch_size
        batches = [
            TensorBatch.of(self.samples.batch(first, size), device)
            for first in range(start, start + settings.num_sequences, size)
        ]
        return batches, time.perf_counter() - began_s

    def _dropout(self, step: int) -> SampleDropout:
        layout, length = self.pipeline.mesh.layout, self.settings.seq_len
        on_slice = layout.tp > 1 and layout.sequence_parallel
        return SampleDropout(
            probability=self.model.spec.dropout,
            seed=self.settings.seed,
            step=step,
            first_sample=self.first_sample(step),
            length=length,
            first_position=self.pipeline.mesh.place.slice * length // layout.tp if on_slice else 0,
        )

    def _actions(self, microbatches: int) -> list[Action]:
        layout = self.pipeline.mesh.layout
        stage = self.pipeline.mesh.place.stage
        return schedule(self.settings.pipeline, layout.pp, stage, microbatches, layout.chunks)

    def _account(
        self, totals: Totals, label_count: Tensor
    ) -> tuple[dict[str, Value], dict[int, Statistics]]:
        """The losses and loads of the whole batch, and the statistics of each MoE layer."""
        mesh, spec = self.pipeline.mesh, self.model.spec
        lm_sum, *balance = mesh.sum(totals.losses).tolist()
        lm_loss = lm_sum / float(label_count)
        layers = {}
        for layer in spec.moe_layers:
            mine = totals.statistics.get(layer, Statistics.zero(spec.experts_in_layer(layer)))
            layers[layer] = report.reduce(mine, mesh.sum)
        values: dict[str, Value] = {"loss": lm_loss + sum(balance), "lm_loss": lm_loss}
        if layers:
            values |= dict(zip(LOSSES, balance, strict=True)) | report.expert_load(layers)
        return values, layers

    def _update_routers(self, layers: Mapping[int, Statistics]) -> None:
        """Once per optimizer step, by what the whole batch did: the same on all ranks."""
        for layer, statistics in layers.items():
            block = self.model.layers[layer]
            if isinstance(block, Block):  # else it lives on another stage
                assert isinstance(block.ffn, MoE)
                block.ffn.router.update(statistics)


def run_steps(
    trainer: Trainer,
    *,
    done: int,
    max_steps: int,
    recorders: Sequence[Recorder],
    after_step: Callable[[int], None],
) -> None:
    """Take steps done+1 .. max_steps; `after_step(step)` validates and saves as it sees fit."""
    for step in range(done + 1, max_steps + 1):
        values = trainer.step(step)
        for recorder in recorders:
            recorder.record(step, **values)
        after_step(step)


def _check_finite(step: int, rate: float, *values: Value) -> None:
    """Every rank sees the same sums, so all of them stop here, before the state is saved."""
    if not all(math.isfinite(value) for value in values if isinstance(value, float)):
        raise ConfigError(
            f"training diverged at step {step}: its loss or gradient is not a finite number; lower "
            f"schedule.learning_rate (this step took {rate:g}) and start again from a checkpoint"
        )
