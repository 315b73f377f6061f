"""What runs on each Ray Train worker: join the mesh, build this rank's part, loop."""

import contextlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from cluster.coordinator_actor import join as join_coordinator
from cluster.messages import ExpertRange, Shard
from cluster.reporter import Reporter
from gptmoe import checkpoint
from gptmoe.checkpoint import Checkpoint
from gptmoe.data import Samples, Split, open_samples
from gptmoe.evaluate import Evaluation, evaluate
from gptmoe.loaded import named_dtype
from gptmoe.metrics import Recorder
from gptmoe.model.transformer import GPT
from gptmoe.parallel import mesh as meshes
from gptmoe.parallel.apply import build
from gptmoe.parallel.mesh import Mesh
from gptmoe.parallel.ownership import owned_parameters, weight_pieces
from gptmoe.parallel.updater import PlainUpdater, Updater
from gptmoe.text import load_tokenizer

from .loop import StepSettings, Trainer, run_steps
from .plan import RunPlan
from .recorders import make_recorders
from .state import writing
from .zero import ZeroUpdater


def work(settings: dict[str, Any]) -> None:
    """What Ray Train calls on every worker; `settings` holds plan, run_name and threads."""
    plan: RunPlan = settings["plan"]
    run_name: str = settings["run_name"]
    torch.set_num_threads(settings["threads"])
    rank = ray.train.get_context().get_world_rank()
    mesh = meshes.join(plan.config.parallel.layout(), rank, timedelta(minutes=10))
    with contextlib.ExitStack() as held:
        recorders: list[Recorder] = []
        if rank == 0:
            held.enter_context(writing(plan.run_dir))
            recorders = make_recorders(plan.run_dir, run_name, plan.done)
        worker = Worker.start(
            plan,
            mesh,
            ray.train.torch.get_device(),
            recorders=recorders,
            heartbeat=_register(plan, mesh, run_name).heartbeat,
            saved=lambda step: ray.train.report({"step": step}),
        )
        worker.run()


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One rank of a run. It knows ranks, but not Ray."""

    plan: RunPlan
    mesh: Mesh
    model: GPT
    updater: Updater
    trainer: Trainer
    validation: Samples | None
    characters_per_token: list[int]
    recorders: Sequence[Recorder]
    heartbeat: Callable[..., None]
    saved: Callable[[int], None]

    @classmethod
    def start(
        cls,
        plan: RunPlan,
        mesh: Mesh,
        device: torch.device,
        *,
        recorders: Sequence[Recorder],
        heartbeat: Callable[..., None],
        saved: Callable[[int], None],
    ) -> "Worker":
        """Build this rank's part and load what there is to load.

        `heartbeat(step)` is called after each step, with last=True at the end; `saved(step)` after
        each checkpoint.
        """
        model, updater = build_or_load(plan, mesh, device)
        trainer = Trainer(
            model=model,
            updater=updater,
            samples=_samples(plan, "train"),
            settings=_step_settings(plan, mesh),
            sum_over_ranks=mesh.sum,
        )
        return cls(
            plan=plan,
            mesh=mesh,
            model=model,
            updater=updater,
            trainer=trainer,
            validation=_samples(plan, "validation") if plan.has_validation else None,
            characters_per_token=load_tokenizer(plan.tokenizer_path).characters_per_token(),
            recorders=recorders,
            heartbeat=heartbeat,
            saved=saved,
        )

    def run(self) -> None:
        """Take the steps that are left; the last one is validated and saved."""
        self.model.train()
        self.heartbeat(self.plan.done)
        run_steps(
            self.trainer,
            done=self.plan.done,
            max_steps=self.plan.max_steps,
            recorders=self.recorders,
            after_step=self.after_step,
        )
        self.heartbeat(self.plan.max_steps, last=True)
        for recorder in self.recorders:
            recorder.close()

    def after_step(self, step: int) -> None:
        """Heartbeat, validate, save: each when it is due."""
        self.heartbeat(step)
        config, last = self.plan.config, step == self.plan.max_steps
        if last or _due(step, config.train.validate_every_steps) or self._epoch_ends(step):
            self.validate(step)
        if last or _due(step, config.checkpoint.every_steps):
            self.save(step)
            self.saved(step)

    def validate(self, step: int) -> None:
        """Validation loss over all ranks' shares."""
        if self.validation is None:
            return
        mine = evaluate(
            self.model,
            self.validation,
            self.characters_per_token,
            self.plan.config.train.microbatch_size,
            limit=self.plan.config.train.validation_samples or None,
            share=(self.mesh.rank, self.mesh.layout.dp),
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

    def save(self, step: int) -> None:
        """Write this rank's part of the checkpoint; rank 0 commits and prunes."""
        plan, checkpoints = self.plan, self.plan.run_dir / "checkpoints"
        checkpoint.save(
            checkpoints / checkpoint.checkpoint_name(step),
            rank=self.mesh.rank,
            world=self.mesh.layout.world,
            barrier=self.mesh.barrier,
            groups={
                "weights": weight_pieces(
                    owned_parameters(self.model, self.mesh.layout, self.mesh.rank)
                ),
                "optimizer": self.updater.state_pieces(),
            },
            config=plan.stored_config(),
            progress={"step": step, "samples": step * plan.config.batch_sequences},
            copy_files=load_tokenizer(plan.tokenizer_path).save,
        )
        if self.mesh.rank == 0:
            checkpoint.prune(checkpoints, plan.config.checkpoint.keep)

    def _epoch_ends(self, step: int) -> bool:
        size, count = self.plan.config.batch_sequences, self.trainer.samples.num_samples
        return step * size // count > (step - 1) * size // count


def build_or_load(plan: RunPlan, mesh: Mesh, device: torch.device) -> tuple[GPT, Updater]:
    """This rank's model and updater, with the state that they begin from."""
    start = plan.resume_from or plan.weights_from
    config = plan.config
    model = build(
        plan.spec,
        mesh,
        device,
        compute_dtype=named_dtype(config.train.dtype),
        seed=None if start else config.run.seed,
    )
    stored = checkpoint.open_checkpoint(start) if start else None
    if stored is not None:
        load_weights(model, stored, mesh)
    updater_type = ZeroUpdater if config.parallel.zero else PlainUpdater
    updater = updater_type(model, mesh, config.optimizer)
    if stored is not None and plan.resume_from is not None:
        updater.load_state(lambda name, box: stored.read(name, box, "optimizer"))
    return model, updater


@torch.no_grad()
def load_weights(model: GPT, stored: Checkpoint, mesh: Mesh) -> None:
    """Fill this rank's parameters from a checkpoint of any layout."""
    for owned in owned_parameters(model, mesh.layout, mesh.rank):
        owned.parameter.copy_(stored.read(owned.name, owned.box))


def _register(plan: RunPlan, mesh: Mesh, run_name: str) -> Reporter:
    group = [secrets.token_hex(4)]
    if mesh.world_group is not None:
        dist.broadcast_object_list(group, src=0, group=mesh.world_group)
    experts = tuple(
        ExpertRange(layer=layer, first=first, end=end)
        for layer in plan.spec.moe_layers
        for first, end in [mesh.layout.experts_of(mesh.rank, plan.spec.experts_in_layer(layer))]
    )
    shard = Shard(stage=0, first_layer=0, end_layer=plan.spec.num_layers, experts=experts)
    return join_coordinator(
        run_name, group[0], worker=f"train-{mesh.rank}", rank=mesh.rank, shard=shard
    )


def _samples(plan: RunPlan, split: Split) -> Samples:
    config = plan.config
    return open_samples(plan.data_folder, split, config.data.seq_len, config.run.seed)


def _step_settings(plan: RunPlan, mesh: Mesh) -> StepSettings:
    config = plan.config
    share = config.batch_sequences // mesh.layout.dp
    return StepSettings(
        seed=config.run.seed,
        seq_len=config.data.seq_len,
        batch_sequences=config.batch_sequences,
        microbatch_size=config.train.microbatch_size,
        first_sequence=mesh.rank * share,
        num_sequences=share,
        schedule=config.schedule,
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
