"""One arm of a study in this process: plain PyTorch, without Ray and DeepSpeed.

It is the training run of `gptmoe pretrain`: the same plan, step, checkpoint and files. Its
validation samples are drawn from all files, and its last weights are judged once more.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gptmoe import data
from gptmoe.data import Samples
from gptmoe.evaluate import Evaluation, evaluate
from gptmoe.metrics import JsonlRecorder, cut_after
from gptmoe.model.expert_choice import acausal_routing
from gptmoe.parallel.mesh import single
from gptmoe.parallel.pipeline import Pipeline
from gptmoe.parallel.updater import PlainUpdater
from gptmoe.text import load_tokenizer
from train.assemble import build_or_load, samples_of, save, step_settings
from train.ledger import Ledger, next_attempt
from train.loop import Scaler, Trainer, run_steps
from train.plan import RunPlan, make_plan
from train.saving import Saver
from train.state import writing

from .load import judge_load
from .order import Order, write_done

log = logging.getLogger(__name__)

_SHUFFLE = 20_240_817
"""Draws the validation samples: one seed for all arms and seeds of a study."""


class Paused(Exception):
    """The time is up, or somebody asked to stop; all is saved."""


@dataclass(frozen=True, kw_only=True)
class ArmTraining:
    """What one arm's run is made of."""

    plan: RunPlan
    trainer: Trainer
    saver: Saver
    ledger: Ledger
    recorder: JsonlRecorder
    validation: Samples
    characters_per_token: list[int]
    must_stop: Callable[[], bool]

    def run(self) -> None:
        """Take the steps that are left. Raises Paused when told to stop, after saving."""
        self.trainer.model.train()
        run_steps(
            self.trainer,
            done=self.plan.done,
            max_steps=self.plan.max_steps,
            recorders=[self.recorder],
            after_step=self.after_step,
        )

    def after_step(self, step: int) -> None:
        """Ledger, validate, save: each when it is due."""
        config, last = self.plan.config, step == self.plan.max_steps
        self.ledger.note(step, self.trainer.first_sample(step), config.batch_sequences)
        if last or _due(step, config.train.validate_every_steps):
            result = self.judge(config.train.validation_samples)
            self.recorder.record(
                step,
                val_loss=result.loss,
                val_perplexity=result.perplexity,
                bits_per_char=result.bits_per_char,
            )
        stop = self.must_stop()
        if last or stop or _due(step, config.checkpoint.every_steps):
            save(self.saver, self.trainer, step)
        if last or stop:
            self.saver.finish()
        if stop and not last:
            raise Paused(f"after step {step} of {self.plan.max_steps}")

    def judge(self, limit: int) -> Evaluation:
        """Loss of so many validation samples (0 = all), routed as the model serves: causally."""
        return self._evaluate(limit, self.plan.config.train.microbatch_size)

    def judge_acausally(self, limit: int) -> Evaluation:
        """The same weights, experts choosing among all tokens of a group as in training."""
        with acausal_routing(self.trainer.model):
            return self._evaluate(limit, self.plan.config.router.group_sequences)

    def _evaluate(self, limit: int, batch_size: int) -> Evaluation:
        return evaluate(
            self.trainer.model,
            self.validation,
            self.characters_per_token,
            batch_size,
            limit=limit or None,
        )


def train_arm(order: Order, device: torch.device, must_stop: Callable[[], bool]) -> None:
    """Train an arm to its end, judge it and write done.json. Raises Paused when told to stop."""
    order.folder.mkdir(parents=True, exist_ok=True)
    with writing(order.folder), contextlib.ExitStack() as held:
        arm = _start(order, device, must_stop, held)
        arm.run()
        write_done(order, _verdict(arm, order.final_samples))


def measure(order: Order, device: torch.device) -> None:
    """Take a few steps and write their tokens/s: the median of all but the first few."""
    order.folder.mkdir(parents=True, exist_ok=True)
    plan = make_plan("pretrain", order.config)
    trainer = _trainer(plan, device)
    trainer.model.train()
    speeds = [float(_speed(trainer, step)) for step in range(1, plan.max_steps + 1)]
    settled = sorted(speeds[min(2, len(speeds) - 1) :])
    write_done(order, {"tokens_per_s": settled[len(settled) // 2]})


def _start(
    order: Order, device: torch.device, must_stop: Callable[[], bool], held: contextlib.ExitStack
) -> ArmTraining:
    plan = make_plan("pretrain", order.config)
    path = plan.run_dir / "metrics.jsonl"
    cut_after(path, plan.done)
    seq_len = plan.config.data.seq_len
    tokenizer = load_tokenizer(plan.tokenizer_path)
    saver = Saver(
        plan.run_dir / "checkpoints",
        rank=0,
        world=1,
        barrier=lambda: None,
        config=plan.stored_config(),
        copy_files=tokenizer.save,
        keep=plan.config.checkpoint.keep,
    )
    ledger = Ledger(plan.run_dir, next_attempt(plan.run_dir), 0, plan.done)
    return ArmTraining(
        plan=plan,
        trainer=_trainer(plan, device),
        saver=held.enter_context(contextlib.closing(saver)),
        ledger=held.enter_context(contextlib.closing(ledger)),
        recorder=held.enter_context(JsonlRecorder(path)),
        validation=data.open_samples(
            plan.data_folder, "validation", seq_len, _SHUFFLE, shuffled=True
        ),
        characters_per_token=tokenizer.characters_per_token(),
        must_stop=must_stop,
    )


def _trainer(plan: RunPlan, device: torch.device) -> Trainer:
    mesh = single()
    model, updater = build_or_load(
        plan, mesh, device, lambda model, mesh, config: PlainUpdater(model, mesh, config.optimizer)
    )
    return Trainer(
        pipeline=Pipeline(model, mesh),
        updater=updater,
        samples=samples_of(plan, "train"),
        settings=step_settings(plan, mesh),
        scaler=Scaler(plan.loss_scale),
    )


def _verdict(arm: ArmTraining, samples: int) -> dict[str, Any]:
    """The numbers of the finished weights: with causal routing, and what the future would add."""
    began_s = time.perf_counter()
    causal = arm.judge(samples)
    result: dict[str, Any] = {
        "loss": causal.loss,
        "bits_per_char": causal.bits_per_char,
        "tokens": causal.tokens,
    }
    spec = arm.trainer.model.spec
    if spec.num_experts and spec.router.kind == "expert_choice":
        result["acausal_loss"] = arm.judge_acausally(samples).loss
    if spec.num_experts:
        size = arm.plan.config.train.microbatch_size
        load = judge_load(arm.trainer.model, arm.validation, size, samples)
        result["load"] = [asdict(layer) for layer in load]
    log.info("judged in %.1f s", time.perf_counter() - began_s)
    return result


def _speed(trainer: Trainer, step: int) -> float:
    value = trainer.step(step)["tokens_per_s"]
    assert isinstance(value, float)
    return value


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
