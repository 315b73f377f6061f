"""Make a plain GPT distributed, from outside, in one visible order."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from gptmoe.model.experts import Experts
from gptmoe.model.initialize import initial_values
from gptmoe.model.layers import Embedding, FeedForward, Linear
from gptmoe.model.moe import MoE
from gptmoe.model.spec import ModelSpec
from gptmoe.model.state import begin_state
from gptmoe.model.transformer import GPT, Block

from .expert import AllToAllDispatcher
from .mesh import Mesh
from .ownership import Owned, owned_parameters
from .recompute import Recompute, recompute
from .shards import ShardedEmbedding, ShardedGPT, ShardedLinear, Shards
from .stages import keep_stage
from .tensor import (
    ColumnLinear,
    RowLinear,
    SlicedExperts,
    SlicedGPT,
    SlicedMoE,
    SlicedPositions,
    SlicedTokens,
    Slices,
    SpreadMoE,
)

M = TypeVar("M", bound=nn.Module)


def build(
    spec: ModelSpec,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    seed: int | None = 0,
    recompute_what: Recompute = "none",
    shards_on: torch.device | None = None,
) -> GPT:
    """This rank's part of the model, with memory only for that part.

    `dtype` is the weights' type, `compute_dtype` the products' (default: the same). `seed` None
    leaves the weights uninitialised, to be read from a checkpoint. `shards_on` is where rows shared
    by data ranks lie (default: `device`).
    """
    mesh.layout.check_model(spec)
    with torch.device("meta"):
        model = GPT(spec, compute_dtype or dtype)
        keep_stage(model, mesh)
        slice_layers(model, mesh)
        shard_layers(model, mesh)
        share_experts(model, mesh)
        recompute(model, recompute_what)
    hold_parts(model, mesh, dtype, device, shards_on or device)
    if seed is not None:
        initialize_parts(owned_parameters(model, mesh.layout, mesh.rank), spec, seed)
    return model


def slice_layers(model: GPT, mesh: Mesh) -> None:
    """Tensor parallelism: each layer in its sliced form."""
    layout, place = mesh.layout, mesh.place
    if layout.tp == 1:
        return
    slices = Slices(mesh.tensor_group, place.slice, layout.tp, layout.sequence_parallel)
    _become(model, SlicedGPT).slices = slices
    if isinstance(model.embed.tokens, Embedding):
        tokens = _become(model.embed.tokens, SlicedTokens)
        tokens.slices, tokens.first = slices, model.spec.vocab_size * place.slice // layout.tp
    if layout.sequence_parallel and isinstance(model.embed.positions, Embedding):
        _become(model.embed.positions, SlicedPositions).slices = slices
    for block in _blocks(model):
        block.attention.num_heads //= layout.tp
        _become(block.attention.qkv, ColumnLinear).slices = slices
        _become(block.attention.out, RowLinear).slices = slices
        if isinstance(block.ffn, MoE):
            _slice_experts(block.ffn, slices, cut=layout.expert_tp)
        for dense in block.ffn.modules():
            if isinstance(dense, FeedForward):
                _become(dense.up, ColumnLinear).slices = slices
                _become(dense.down, RowLinear).slices = slices


def _slice_experts(moe: MoE, slices: Slices, *, cut: bool) -> None:
    if cut:
        _become(moe, SlicedMoE).slices = slices
        _become(moe.experts, SlicedExperts).slices = slices
    else:
        _become(moe, SpreadMoE).slices = slices


def shard_layers(model: GPT, mesh: Mesh) -> None:
    """ZeRO 3: layers that gather their weight from the data ranks when they need it."""
    if not mesh.layout.sharded:
        return
    for module in list(model.modules()):
        weight = getattr(module, "weight", None)
        if weight is None or not mesh.layout.shards(weight.shape):
            continue
        sizes = mesh.layout.shard_sizes(len(weight))
        shards = Shards(mesh.data_group, mesh.place.data, sizes)
        if isinstance(module, Linear):
            _become(module, ShardedLinear).shards = shards
        elif isinstance(module, Embedding):
            _become(module, ShardedEmbedding).shards = shards
    _become(model, ShardedGPT)


def share_experts(model: GPT, mesh: Mesh) -> None:
    """Expert parallelism: keep this rank's experts and reach the others by all-to-all."""
    for block in _blocks(model):
        if isinstance(block.ffn, MoE) and mesh.expert_group is not None:
            block.ffn.dispatcher = AllToAllDispatcher(mesh.expert_group, mesh.layout.ep)


def hold_parts(
    model: GPT, mesh: Mesh, dtype: torch.dtype, device: torch.device, shards_on: torch.device
) -> None:
    """Give each parameter memory for this rank's part of it, and routers their first state."""
    for owned in owned_parameters(model, mesh.layout, mesh.rank):
        module_name, _, kind = owned.name.rpartition(".")
        module = model.get_submodule(module_name)
        boxes = owned.cut.boxes
        rows = sum(box.shape[0] for box in boxes)
        place = shards_on if owned.cut.is_sharded else device
        part = torch.empty(rows, *boxes[0].shape[1:], dtype=dtype, device=place)
        setattr(module, kind, nn.Parameter(part))
        if isinstance(module, Experts):
            module.first = boxes[0].start[0]
    begin_state(model, device, dtype)


@torch.no_grad()
def initialize_parts(owned: Sequence[Owned], spec: ModelSpec, seed: int) -> None:
    """This rank's parts of the initial weights, which do not depend on the layout."""
    for o in owned:
        for box, part in o.parts(o.parameter):
            part.copy_(initial_values(o.name, o.full_shape, spec, seed, box))


def _blocks(model: GPT) -> list[Block]:
    return [block for block in model.layers if isinstance(block, Block)]


def _become(module: nn.Module, cls: type[M]) -> M:
    """Turn a module into a subclass that only computes differently; names and weights stay."""
    assert issubclass(cls, type(module))
    module.__class__ = cls
    assert isinstance(module, cls)
    return module
