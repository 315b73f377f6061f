"""The training loop. It knows neither Ray nor ranks: samples, sums and recorders are handed in."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptmoe.data import Samples
from gptmoe.errors import ConfigError
from gptmoe.metrics import Recorder
from gptmoe.model.loss import weighted_loss
from gptmoe.model.moe import MoE
from gptmoe.model.routing import Statistics
from gptmoe.model.transformer import GPT
from gptmoe.parallel.updater import Updater
from gptmoe.tensors import TensorBatch

from . import report
from .schedule import ScheduleSpec, learning_rate

Sum = Callable[[Tensor], Tensor]
"""Sum of a tensor over all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """The numbers that shape one optimizer step. Sequences are counted over the global batch."""

    seed: int
    seq_len: int
    batch_sequences: int
    microbatch_size: int
    first_sequence: int
    """Of the batch's sequences, this rank takes num_sequences from here on."""
    num_sequences: int
    schedule: ScheduleSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """What a step needs; it holds no state of its own beside the model's and the updater's."""

    model: GPT
    updater: Updater
    samples: Samples
    settings: StepSettings
    sum_over_ranks: Sum

    def step(self, step: int) -> dict[str, report.Value]:
        """Take optimizer step `step`, counted from 1, and return what is to be recorded."""
        began_s = time.perf_counter()
        microbatches, data_wait_s = self._load(step)
        seed_dropout(self.settings.seed, step, self.settings.first_sequence)
        label_count = self.sum_over_ranks(
            torch.stack([batch.weight_BT.sum() for batch in microbatches]).sum().double()
        )
        totals = Totals.zero()
        for batch in microbatches:
            totals = totals + self._forward_backward(batch, label_count)
        losses = self._account(totals, label_count)
        rate = learning_rate(self.settings.schedule, step)
        grad_norm = self.updater.step(rate)
        _check_finite(step, rate, losses["loss"], grad_norm)
        return {
            **losses,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            **report.speed(
                self.settings.batch_sequences * self.settings.seq_len, began_s, data_wait_s
            ),
            **report.position(
                step, self.settings.batch_sequences, self.settings.seq_len, self.samples.num_samples
            ),
        }

    def _load(self, step: int) -> tuple[list[TensorBatch], float]:
        settings, began_s = self.settings, time.perf_counter()
        start = (step - 1) * settings.batch_sequences + settings.first_sequence
        device = self.model.embed.tokens.weight.device
        size = settings.microbatch_size
        batches = [
            TensorBatch.of(self.samples.batch(first, size), device)
            for first in range(start, start + settings.num_sequences, size)
        ]
        return batches, time.perf_counter() - began_s

    def _forward_backward(self, batch: TensorBatch, label_count: Tensor) -> "Totals":
        """Add this microbatch's share of the global loss's gradient."""
        spec = self.model.spec.router
        output = self.model(batch.token_BT, valid_BT=batch.valid_BT)
        loss_sum = weighted_loss(
            self.model.logits(output.hidden_BTD), batch.label_BT, batch.weight_BT
        )
        groups = self.settings.batch_sequences / spec.group_sequences
        aux = _total(r.losses["aux_loss"] for r in output.routings) * (spec.aux_loss_coef / groups)
        z = _total(r.losses["z_loss"] for r in output.routings) * (spec.z_loss_coef / groups)
        loss = loss_sum / label_count + aux + z
        loss.backward()
        losses = torch.stack(
            [torch.as_tensor(x).detach().double().cpu() for x in (loss_sum, aux, z)]
        )
        return Totals(losses, tuple(routing.statistics for routing in output.routings))

    def _account(self, totals: "Totals", label_count: Tensor) -> dict[str, report.Value]:
        lm_sum, aux, z = self.sum_over_ranks(totals.losses).tolist()
        lm_loss = lm_sum / float(label_count)
        layers = [
            report.reduce(statistics, self.sum_over_ranks) for statistics in totals.statistics
        ]
        for layer, statistics in zip(self.model.spec.moe_layers, layers, strict=True):
            moe = self.model.layers[layer].ffn
            assert isinstance(moe, MoE)
            moe.router.update(statistics)
        values: dict[str, report.Value] = {"loss": lm_loss + aux + z, "lm_loss": lm_loss}
        if layers:
            values |= {"aux_loss": aux, "z_loss": z, **report.expert_load(layers)}
        return values


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a step's microbatches on one rank: [lm loss sum, aux loss, z loss], per layer."""

    losses: Tensor
    statistics: tuple[Statistics, ...]

    @classmethod
    def zero(cls) -> "Totals":
        """The start of a step."""
        return cls(torch.zeros(3, dtype=torch.float64), ())

    def __add__(self, other: "Totals") -> "Totals":
        pairs = zip(self.statistics, other.statistics, strict=True) if self.statistics else ()
        return Totals(
            self.losses + other.losses, tuple(a + b for a, b in pairs) or other.statistics
        )


def seed_dropout(seed: int, step: int, first_sequence: int) -> None:
    """Make dropout a function of step and slice, not of history: a resumed run repeats it."""
    digest = hashlib.sha256(f"dropout/{seed}/{step}/{first_sequence}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


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


def _check_finite(step: int, rate: float, *values: report.Value) -> None:
    """Every rank sees the same sums, so all of them stop here, before the state is saved."""
    if not all(math.isfinite(value) for value in values if isinstance(value, float)):
        raise ConfigError(
            f"training diverged at step {step}: its loss or gradient is not a finite number; lower "
            f"schedule.learning_rate (this step took {rate:g}) and start again from a checkpoint"
        )


def _total(losses: Iterable[Tensor]) -> Tensor:
    return sum(losses, torch.zeros(()))
