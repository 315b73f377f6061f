"""How each logical parameter is cut over a layout: pure, by name and shape.

Column cuts split what a layer puts out, row cuts what it takes in; a pair of them needs one sum
(Shoeybi et al. 2019, arXiv 1909.08053, section 3). The token table is cut along the vocabulary.
Queries, keys and values lie one after the other in one matrix: each third is cut for itself.
"""

import re
from dataclasses import dataclass

from gptmoe.checkpoint.boxes import Box

from .layout import Layout

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERTS = "ffn.experts."
_SHARED = re.compile(r"ffn\.(residual\.\d+|shared)\.")
"""Feed-forward layers beside or behind experts; cut as a dense layer's own."""

_ALONG = {
    "embed.tokens.weight": 0,
    "attention.qkv.weight": 0,
    "attention.qkv.bias": 0,
    "attention.out.weight": 1,
    "ffn.up.weight": 0,
    "ffn.up.bias": 0,
    "ffn.down.weight": 1,
}
_EXPERTS_ALONG = {"up_weight": 1, "up_bias": 1, "down_weight": 2}
"""With Layout.expert_tp; dimension 0 counts experts."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What one rank has to do with one logical parameter."""

    boxes: tuple[Box, ...]
    """What it holds; its own tensor is their values one after the other along dimension 0. Empty:
    the parameter lives on other stages."""
    is_expert: bool
    is_partial: bool
    """The ranks of its tensor group see parts of its gradient, which are to be summed."""
    is_sharded: bool
    """Data ranks hold different rows (ZeRO 3); gradients arrive summed over them."""
    is_tied: bool
    """First and last stage hold a copy each, whose gradients are to be summed."""
    is_first_copy: bool
    """False where a rank of the same samples on another slice or stage speaks for these boxes."""
    copies: int
    """Ranks with other samples that hold these boxes, this one included."""
    turn: int
    """Its number among them."""


def cut(name: str, shape: tuple[int, ...], layout: Layout, rank: int, num_layers: int) -> Cut:
    """What `rank` holds of the parameter `name`, whose logical shape is `shape`."""
    place, part = layout.place(rank), local_name(name)
    is_expert = part.startswith(_EXPERTS)
    is_sharded = layout.shards(shape)
    along = _along(part, layout)
    stages = {home_stage(name, layout, num_layers)}
    if name == "embed.tokens.weight":  # the head is the same table
        stages.add(layout.pp - 1)
    boxes: tuple[Box, ...] = ()
    if place.stage in stages:
        box = Box.whole(shape)
        if is_expert:
            box = box.narrow(0, *layout.experts_of(rank, shape[0]))
        if is_sharded:
            box = _share(box, 0, place.data, layout.dp)
        boxes = (box,) if along is None else _slices(part, box, along, place.slice, layout.tp)
    is_sliced = along is not None or (is_expert and not layout.expert_tp)
    turns = (layout.dp, place.data)
    if is_expert:
        turns = layout.expert_span // layout.ep, layout.expert_part(rank)[1]
    copies, turn = (1, 0) if is_sharded else turns
    return Cut(
        boxes,
        is_expert,
        is_partial=layout.tp > 1 and not is_sliced and _is_partial(part, layout),
        is_sharded=is_sharded,
        is_tied=len(stages) > 1,
        is_first_copy=(is_sliced or place.slice == 0) and place.stage == min(stages),
        copies=copies,
        turn=turn,
    )


def local_name(name: str) -> str:
    """A parameter's name within its layer: `attention.qkv.weight`."""
    match = _LAYER.fullmatch(name)
    return match[2] if match else name


def home_stage(name: str, layout: Layout, num_layers: int) -> int:
    """The stage that holds a parameter: embeddings on the first, the last norm on the last."""
    match = _LAYER.fullmatch(name)
    if match:
        return layout.stage_of(int(match[1]), num_layers)
    return layout.pp - 1 if name.startswith("norm.") else 0


def _along(part: str, layout: Layout) -> int | None:
    """The dimension that tensor parallelism cuts; None = it does not."""
    if layout.tp == 1:
        return None
    if part.startswith(_EXPERTS):
        return _EXPERTS_ALONG.get(part.removeprefix(_EXPERTS)) if layout.expert_tp else None
    return _ALONG.get(_SHARED.sub("ffn.", part))


def _is_partial(part: str, layout: Layout) -> bool:
    """Whether slices of one tensor group get parts of the gradient of what each holds whole.

    With sequence parallelism each has seen its part of the sequence only. Without, all have seen
    all, except for what acts on rows that they share between them: routers, and the biases that
    only slice 0 adds to the experts' sums.
    """
    shared_rows = part == "ffn.router.weight" or part == f"{_EXPERTS}down_bias"
    return layout.sequence_parallel or shared_rows


def _slices(part: str, box: Box, along: int, index: int, parts: int) -> tuple[Box, ...]:
    thirds = 3 if part.startswith("attention.qkv.") else 1
    return tuple(
        _share(box.cut(along, third, thirds), along, index, parts) for third in range(thirds)
    )


def _share(box: Box, along: int, index: int, parts: int) -> Box:
    """Part `index` of `parts` along a dimension; as equal as its size allows."""
    start, size = box.start[along], box.shape[along]
    return box.narrow(along, start + size * index // parts, start + size * (index + 1) // parts)
