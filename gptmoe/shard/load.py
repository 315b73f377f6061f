"""A rank's part of a model, read from a checkpoint of any layout: only its boxes are touched."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptmoe.checkpoint import Checkpoint
from gptmoe.checkpoint.boxes import Box
from gptmoe.generate.packed import PackedExperts, pack
from gptmoe.generate.packed_weight import can_pack
from gptmoe.model.experts import Experts
from gptmoe.model.moe import MoE
from gptmoe.model.spec import ModelSpec
from gptmoe.model.state import read_state
from gptmoe.model.transformer import GPT
from gptmoe.parallel.apply import slice_layers
from gptmoe.parallel.cuts import cut
from gptmoe.parallel.layout import Layout
from gptmoe.parallel.mesh import Mesh
from gptmoe.parallel.stages import Elsewhere, keep_stage
from gptmoe.stored import check_shape, kept_dtype

from .parts import Part, layout_of

READERS = 4
"""Tensors that are read at once."""

Progress = Callable[[int, int], None]
"""Told bytes read and bytes in all."""


@dataclass(frozen=True, slots=True)
class Weights:
    """One version of a part's weights: a model whose experts are the part's, or experts alone."""

    experts: dict[int, Experts]
    """By layer."""
    model: GPT | None
    num_bytes: int


def load_part(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    parts: Sequence[Part],
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = lambda done, total: None,
) -> Weights:
    """Read what `parts[rank]` owns. Raises CheckpointError for a missing or other tensor."""
    part, layout = parts[rank], layout_of(parts)
    with torch.device("meta"):
        model = GPT(spec, compute_dtype=dtype)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        if not part.experts_only:
            mesh = Mesh(layout, rank)
            keep_stage(model, mesh)
            slice_layers(model, mesh)
    wanted = {
        name: _boxes(name, shapes[name], spec, part, layout, rank)
        for name, _ in model.named_parameters()
        if not part.experts_only or _expert_layer(name) in part.layers
    }
    for name in wanted:
        check_shape(checkpoint, name, shapes[name])
    num_bytes = _read_all(checkpoint, model, wanted, dtype, device, progress)
    experts = {
        layer: _experts(model, layer) for layer in part.layers if spec.experts_in_layer(layer)
    }
    if part.experts_only:
        if can_pack(dtype, device):
            experts = {layer: PackedExperts(held, dtype) for layer, held in experts.items()}
        return Weights(experts, None, num_bytes)
    read_state(checkpoint, model, device, dtype)
    is_last = part.stage == layout.pp - 1
    if pack(model, head=is_last) and is_last and part.stage > 0:
        model.embed.tokens = Elsewhere()  # type: ignore[assignment]  # its packed copy is the head
    experts = {layer: _experts(model, layer) for layer in experts}
    return Weights(experts, model.eval(), num_bytes)


def _boxes(
    name: str, shape: Sequence[int], spec: ModelSpec, part: Part, layout: Layout, rank: int
) -> tuple[Box, ...]:
    """The boxes of a parameter that the part holds, one after the other along dimension 0."""
    layer = _expert_layer(name)
    if layer is None:
        return cut(name, tuple(shape), layout, rank, spec.num_layers).boxes
    whole = Box.whole(shape)
    spans = [span for span in part.experts if span.layer == layer]
    return tuple(whole.narrow(0, span.first, span.end) for span in spans)


def _read_all(
    checkpoint: Checkpoint,
    model: GPT,
    wanted: dict[str, tuple[Box, ...]],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> int:
    total = sum(
        box.volume * kept_dtype(name, dtype).itemsize
        for name, boxes in wanted.items()
        for box in boxes
    )
    done = 0

    def read(name: str) -> tuple[str, Tensor]:
        return name, _read(checkpoint, name, wanted[name], dtype, device)

    with ThreadPoolExecutor(READERS) as pool:
        for name, tensor in pool.map(read, wanted):
            owner, _, attribute = name.rpartition(".")
            parameter = nn.Parameter(tensor, requires_grad=False)
            setattr(model.get_submodule(owner), attribute, parameter)
            done += tensor.nbytes
            progress(done, total)
    return done


def _read(
    checkpoint: Checkpoint,
    name: str,
    boxes: tuple[Box, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    kept = kept_dtype(name, dtype)
    read = [checkpoint.read(name, box).to(device=device, dtype=kept) for box in boxes]
    if not read:
        return torch.empty(0, *checkpoint.shape(name)[1:], dtype=kept, device=device)
    return read[0] if len(read) == 1 else torch.cat(read)


def _expert_layer(name: str) -> int | None:
    """The layer whose experts a parameter belongs to; None for all other parameters."""
    return int(name.split(".")[1]) if ".ffn.experts." in name else None


def _experts(model: GPT, layer: int) -> Experts:
    ffn = model.get_submodule(f"layers.{layer}.ffn")
    assert isinstance(ffn, MoE)
    return ffn.experts
