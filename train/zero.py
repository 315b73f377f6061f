"""ZeRO 1 and 2 by DeepSpeed: each rank keeps and updates its own part of the optimizer's state,
and with ZeRO 2 keeps no other part of the gradients from one microbatch to the next.

The seam is DeepSpeed's ZeRO optimizer, without the engine around it. The engine wants LOCAL_RANK in
the environment, keeps expert groups in process-wide tables, believes in experts only if it finds an
instance of its own MoE class, and reduces in hooks on the backward pass. The optimizer takes groups
as arguments and is told when the gradients are there: the loop may call plain `loss.backward()` as
often as it likes.

Gradients are summed, by the rule in gptmoe/parallel/updater.py: `gradient_average=False` takes
every division out; with it on, expert gradients too would be divided by the number of all ranks.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.timer import NoopTimer
from torch import Tensor

from gptmoe.checkpoint.boxes import Piece
from gptmoe.model.transformer import GPT
from gptmoe.parallel.mesh import Mesh
from gptmoe.parallel.optimizer import OptimizerSpec
from gptmoe.parallel.ownership import Owned, owned_parameters
from gptmoe.parallel.updater import (
    BUCKET_BYTES,
    Read,
    complete_gradients,
    global_norm,
    make_optimizer,
    parameter_groups,
    rescale,
)

from .zero_state import fragments, load_moments, moment_pieces, spoken_for


class ZeroUpdater:
    """An Updater whose state is split over the ranks that hold the same parameters.

    The weights must be in the model already: the partitions start as copies of them.
    """

    def __init__(self, model: GPT, mesh: Mesh, spec: OptimizerSpec, stage: int = 1) -> None:
        assert stage == 1 or mesh.layout.pp == 1
        self.stage = stage
        self.mesh = mesh
        self.spec = spec
        self.owned = owned_parameters(model, mesh.layout, mesh.rank)
        self.zero = _zero_optimizer(self.owned, mesh, spec, stage)
        self.fragments = fragments(self.zero, self.owned)

    def microbatch_done(self, *, last: bool) -> None:
        """ZeRO 2: reduce this microbatch's gradients and keep this rank's part."""
        if self.stage == 2:
            self._reduce(last=last)

    def step(self, learning_rate: float, loss_scale: float = 1.0) -> float:
        """Reduce, clip, update; see Updater.step."""
        if self.stage == 1:
            self._reduce(last=True)
        # DeepSpeed's own norm is as exact and slower, and its own clipping divides by norm + 1e-6.
        partitions: dict[int, list[Tensor]] = self.zero.averaged_gradients
        norm = global_norm(spoken_for(partitions, self.fragments), self.mesh) / loss_scale
        if not math.isfinite(norm):
            self.zero.averaged_gradients = dict.fromkeys(partitions)
            self.zero.zero_grad()
            return norm
        for gradients in partitions.values():
            rescale(gradients, norm, self.spec.max_grad_norm, loss_scale)
        for group in self.zero.optimizer.param_groups:
            group["lr"] = learning_rate
        self.zero.step()
        return norm

    def _reduce(self, *, last: bool) -> None:
        complete_gradients(self.owned, self.mesh)
        self.zero.set_gradient_accumulation_boundary(last)
        # Pipelines run backward outside DeepSpeed as we do: this flag makes the buckets only now.
        self.zero.reduce_gradients(pipeline_parallel=True)

    def state_pieces(self) -> list[Piece]:
        """Moments of the fragments that this rank updates."""
        state = self.zero.optimizer.state
        return [
            piece
            for fragment in self.fragments
            for piece in moment_pieces(fragment, state.get(fragment.partition, {}))
        ]

    def load_state(self, read: Read) -> None:
        """Fill moments and step counts."""
        if self.spec.kind == "adamw":
            load_moments(self.zero, self.fragments, read)


def _zero_optimizer(owned: Sequence[Owned], mesh: Mesh, spec: OptimizerSpec, stage: int) -> Any:
    _connect(mesh, owned[0].parameter.device)
    # For it None is the group of everybody; in a mesh it is the group of nobody else.
    alone = dist.new_group([mesh.rank], use_local_synchronization=True)
    layout = mesh.layout
    # Experts that every data rank holds are partitioned like everything else.
    group_name = "experts" if layout.replica_groups() != layout.data_groups() else ""
    for o in owned:
        parameter: Any = o.parameter
        parameter.allreduce = not (
            o.cut.is_expert and group_name
        )  # its mark of a split expert: False
        parameter.group_name = group_name
    zero = DeepSpeedZeroOptimizer(
        make_optimizer(list(_groups(owned, spec, group_name)), spec),
        {o.parameter: o.name for o in owned},
        timers=NoopTimer(),
        optimizer_params={},
        contiguous_gradients=True,  # without, it sums the gradients of different experts
        reduce_bucket_size=BUCKET_BYTES // 4,
        dp_process_group=mesh.data_group or alone,
        expert_parallel_group={group_name: mesh.expert_group or alone},
        expert_data_parallel_group={group_name: mesh.replica_group or alone},
        has_moe_layers=bool(group_name),
        communication_data_type=torch.float32,
        gradient_average=False,
        partition_grads=stage == 2,
        check_grad_overflow=False,
        compute_grad_norm=False,  # ZeroUpdater.step does
    )
    for hook in zero._grad_acc_hooks:  # they serve the engine, at a cost in every backward pass
        hook.remove()
    return zero


def _groups(
    owned: Sequence[Owned], spec: OptimizerSpec, group_name: str
) -> Iterable[dict[str, object]]:
    """Parameter groups. Split experts have their own: they are partitioned over fewer ranks."""
    for is_expert in (False, True):
        mark = {"moe": True, "name": group_name} if is_expert and group_name else {}
        for group in parameter_groups([o for o in owned if o.cut.is_expert == is_expert], spec):
            if group["params"]:  # it cannot flatten an empty group
                yield group | mark


def _connect(mesh: Mesh, device: torch.device) -> None:
    """Let DeepSpeed use the device and the process groups that are there."""
    if device.type == "cpu":  # on a machine with GPUs it would put its buffers on one
        set_accelerator(CPU_Accelerator())
    if not dist.is_initialized():
        assert mesh.layout.world == 1
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    # With a compiler at hand it would build a shared-memory collective that only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Left on, discovery asks for the variables of torchrun or for MPI, though all is initialised.
    deepspeed.comm.init_distributed(auto_mpi_discovery=False, verbose=False)
    # Each rank would print this once: it gathers weights by a name that torch 2.13 calls old.
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor.* is deprecated", FutureWarning)
