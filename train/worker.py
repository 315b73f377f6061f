"""What runs on each Ray Train worker: join the mesh, build this rank's part, loop."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train.v2._internal.execution.context import get_train_context

from cluster.coordinator_actor import report_failure
from cluster.planner.devices import Machine
from gptmoe import checkpoint
from gptmoe.data import Samples
from gptmoe.evaluate import Evaluation, evaluate
from gptmoe.metrics import Recorder
from gptmoe.model.transformer import GPT
from gptmoe.parallel import mesh as meshes
from gptmoe.parallel.mesh import Mesh
from gptmoe.parallel.pipeline import Pipeline
from gptmoe.parallel.updater import Updater
from gptmoe.text import load_tokenizer

from .assemble import build_or_load, samples_of, save, step_settings
from .elastic import fit
from .ledger import Ledger, next_attempt
from .loop import Scaler, Trainer, run_steps
from .memory import check_fits, free_bytes, machine_here
from .notices import Notices
from .plan import RunPlan
from .recorders import make_recorders
from .recovery import RestartError
from .refresh import Refresher, refresher
from .register import register
from .saving import Saver
from .state import writing
from .updaters import make_updater
from .watchdog import Watchdog, group_timeout

log = logging.getLogger(__name__)


def work(settings: dict[str, Any]) -> None:
    """What Ray Train calls on every worker; `settings` holds plan, run_name and threads.

    It may be called again in new processes, and more or fewer of them, after a worker was lost.
    """
    torch.set_num_threads(settings["threads"])
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    device, ranks_here = ray.train.torch.get_device(), context.get_local_world_size()
    plan, attempt = _agree(settings["plan"], rank, workers, machine_here(device, ranks_here))
    layout, timeout = plan.config.parallel.layout(), group_timeout(plan.config.run.hang_s)
    if rank >= layout.world:
        log.warning("worker %d of %d stays idle: the layout uses %d", rank, workers, layout.world)
        meshes.stand_by(layout, timeout)
        return
    free = free_bytes(device, ranks_here)
    check_fits(plan.config, plan.spec, free, elsewhere=device.type != "cpu")
    mesh = meshes.join(layout, rank, timeout, spare=workers - layout.world)
    run_name: str = settings["run_name"]
    warn = partial(_warn, run_name)
    with contextlib.ExitStack() as held:
        recorders: list[Recorder] = []
        if rank == 0:
            held.enter_context(writing(plan.run_dir))
            recorders = make_recorders(plan.run_dir, run_name, plan.done, warn)
        worker = Worker.start(
            plan,
            mesh,
            device,
            recorders=recorders,
            heartbeat=register(plan, mesh, run_name).heartbeat,
            attempt=attempt,
            notices=Notices(mesh, device, plan.config.run, told=_is_told),
            warn=warn,
        )
        worker.run()


def _warn(run_name: str, reason: str) -> None:
    """In the worker's log, and to whoever watches the run."""
    log.warning("%s", reason)
    report_failure(run_name, reason, goes_on=True)


def _is_told() -> bool:
    """Whether Ray told this worker that a node is about to go.

    `ray.train.get_preemption_info` agrees through an actor, which takes longer than a small step.
    """
    return get_train_context().preemption_context.preemption_info is not None


def _agree(plan: RunPlan, rank: int, workers: int, machine: Machine) -> tuple[RunPlan, int]:
    """Where to go on, by rank 0: newest checkpoint, layout, and number of this attempt."""
    if rank == 0:
        plan = plan.from_newest_checkpoint()
        plan = replace(plan, config=fit(plan.config, plan.spec, workers, machine))
    agreed: list[Any] = [plan, next_attempt(plan.run_dir) if rank == 0 else 0]
    if workers > 1:
        dist.broadcast_object_list(agreed, src=0)
    return agreed[0], agreed[1]


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One rank of a run. It knows ranks, but not Ray."""

    plan: RunPlan
    mesh: Mesh
    model: GPT
    updater: Updater
    trainer: Trainer
    saver: Saver
    follower: Refresher | None
    ledger: Ledger | None
    validation: Samples | None
    characters_per_token: list[int]
    recorders: Sequence[Recorder]
    heartbeat: Callable[..., None]
    notices: Callable[[], str]
    watchdog: Watchdog

    @classmethod
    def start(
        cls,
        plan: RunPlan,
        mesh: Mesh,
        device: torch.device,
        *,
        recorders: Sequence[Recorder],
        heartbeat: Callable[..., None],
        attempt: int = 1,
        notices: Callable[[], str] = lambda: "",
        warn: Callable[[str], None] = log.warning,
    ) -> "Worker":
        """Build this rank's part and load what there is to load.

        `heartbeat(step)` is called after each step, with last=True at the end. `notices()` is
        asked after each step, by all ranks, and tells all the same reason to start again, or none.
        `warn(reason)` is for failures that training survives.
        """
        model, updater = build_or_load(plan, mesh, device, make_updater)
        trainer = Trainer(
            pipeline=Pipeline(model, mesh),
            updater=updater,
            samples=samples_of(plan, "train"),
            settings=step_settings(plan, mesh),
            scaler=Scaler(plan.loss_scale),
        )
        hang_s, target = plan.config.run.hang_s, plan.config.run.refresh
        watchdog = Watchdog(f"train-{mesh.rank}", hang_s)
        follower = refresher(target, plan.run_dir, plan.done, mesh.rank, warn) if target else None
        saver = Saver(
            plan.run_dir / "checkpoints",
            rank=mesh.rank,
            world=mesh.layout.world,
            barrier=meshes.separate_barrier(mesh, group_timeout(hang_s)),
            config=plan.stored_config(),
            copy_files=load_tokenizer(plan.tokenizer_path).save,
            keep=plan.config.checkpoint.keep,
            warn=warn,
            saved=follower.saved if follower else lambda folder: None,
            waits=watchdog.progress,
        )
        place = mesh.place
        keeps_ledger = place.stage == 0 and place.slice == 0
        return cls(
            plan=plan,
            mesh=mesh,
            model=model,
            updater=updater,
            trainer=trainer,
            saver=saver,
            follower=follower,
            ledger=Ledger(plan.run_dir, attempt, place.data, plan.done) if keeps_ledger else None,
            validation=samples_of(plan, "validation") if plan.has_validation else None,
            characters_per_token=load_tokenizer(plan.tokenizer_path).characters_per_token(),
            recorders=recorders,
            heartbeat=heartbeat,
            notices=notices,
            watchdog=watchdog,
        )

    def run(self) -> None:
        """Take the steps that are left; the last one is validated and saved."""
        self.model.train()
        self.heartbeat(self.plan.done)
        with contextlib.closing(self.saver), self.watchdog:
            run_steps(
                self.trainer,
                done=self.plan.done,
                max_steps=self.plan.max_steps,
                recorders=self.recorders,
                after_step=self.after_step,
            )
        self.heartbeat(self.plan.max_steps, last=True)
        if self.ledger:
            self.ledger.close()
        for recorder in self.recorders:
            recorder.close()

    def after_step(self, step: int) -> None:
        """Heartbeat, ledger, validate, save: each when it is due."""
        self.heartbeat(step)
        self.watchdog.progress()
        if self.ledger:
            settings = self.trainer.settings
            self.ledger.note(step, self.trainer.first_sample(step), settings.num_sequences)
        config, last = self.plan.config, step == self.plan.max_steps
        improved = False
        if last or _due(step, config.train.validate_every_steps) or self._epoch_ends(step):
            improved = self.validate(step)
        reason = self.notices()
        if last or reason or improved or _due(step, config.checkpoint.every_steps):
            save(self.saver, self.trainer, step)
        if last or reason:
            self.saver.finish()
        if reason and not last:
            raise RestartError(f"{reason}; all was saved at step {step}")

    def validate(self, step: int) -> bool:
        """Validation loss over all ranks' shares; whether it is to be served."""
        if self.validation is None:
            return False
        mine = evaluate(
            self.model,
            self.validation,
            self.characters_per_token,
            self.plan.config.train.microbatch_size,
            limit=self.plan.config.train.validation_samples or None,
            share=(self.mesh.place.data, self.mesh.layout.dp),
            progress=lambda samples: self.watchdog.progress(),
            mesh=self.mesh,
        )
        sums = torch.tensor([mine.loss_sum, mine.tokens, mine.characters], dtype=torch.float64)
        loss_sum, tokens, characters = self.mesh.sum(sums).tolist()
        result = Evaluation(loss_sum, int(tokens), int(characters))
        for recorder in self.recorders:
            recorder.record(
                step,
                val_loss=result.loss,
                val_perplexity=result.perplexity,
                bits_per_char=result.bits_per_char,
            )
        name = checkpoint.checkpoint_name(step)
        return self.follower is not None and self.follower.improves(result.loss, name)

    def _epoch_ends(self, step: int) -> bool:
        size, count = self.plan.config.batch_sequences, self.trainer.samples.num_samples
        return step * size // count > (step - 1) * size // count


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
