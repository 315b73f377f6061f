"""ZeRO's flat partitions as boxes of logical tensors: a checkpoint knows nothing of ZeRO."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import Any

import torch
from torch import Tensor

from gptmoe.checkpoint.boxes import Box, Piece, flat_range
from gptmoe.parallel.ownership import Owned
from gptmoe.parallel.updater import MOMENTS, Read


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements first .. stop-1 of this rank's part of a parameter, whose state this rank keeps."""

    owned: Owned
    first: int
    stop: int
    group: int
    """Number of the optimizer's parameter group."""
    partition: Tensor
    """The flat float32 weights that hold them; the optimizer's key to their state."""
    offset: int
    """Where they begin in the partition, and so in its flat moments."""

    def boxes(self) -> Iterator[tuple[Box, slice]]:
        """The boxes that they make in the logical tensor, each with its place in the partition."""
        begin, place = 0, self.offset
        for held in self.owned.cut.boxes:
            first, stop = max(self.first - begin, 0), min(self.stop - begin, held.volume)
            for part in flat_range(held.shape, first, stop):
                start = tuple(map(add, held.start, part.start))
                yield Box(start, part.shape), slice(place, place + part.volume)
                place += part.volume
            begin += held.volume


def fragments(zero: Any, owned: Sequence[Owned]) -> list[Fragment]:
    """What a DeepSpeedZeroOptimizer keeps on this rank, read from its map of each parameter."""
    kept = []
    for o in owned:
        parameter: Any = o.parameter
        mapping = parameter._hp_mapping
        if mapping is not None:
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            partition = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            stop, group = here.start + here.numel, mapping.param_group_index
            kept.append(Fragment(o, here.start, stop, group, partition, there.start))
    return kept


def spoken_for(
    partitions: Mapping[int, Sequence[Tensor]], kept: Sequence[Fragment]
) -> list[Tensor]:
    """Of the gradients of each group's partition, in order, those that this rank speaks for.

    A partition holds each fragment once among the data ranks; what other slices or stages hold,
    too, counts once among these.
    """
    counted = {(f.group, f.offset) for f in kept if f.owned.cut.is_first_copy}
    mine = []
    for group, gradients in partitions.items():
        offset = 0
        for gradient in gradients:
            if (group, offset) in counted:
                mine.append(gradient)
            offset += gradient.numel()
    return mine


def moment_pieces(fragment: Fragment, state: dict[str, Tensor]) -> Iterable[Piece]:
    """AdamW's state of a fragment, under the names that the plain updater gives it."""
    owned = fragment.owned
    if not owned.cut.is_first_copy:
        return
    for name in MOMENTS:
        if name in state:
            for box, place in fragment.boxes():
                values = state[name][place].view(box.shape)
                yield Piece(f"{name}/{owned.name}", owned.full_shape, box, values)
    has_first = fragment.first == 0 and not any(owned.cut.boxes[0].start)
    if "step" in state and has_first:
        yield Piece(f"step/{owned.name}", (), Box((), ()), state["step"].detach().float().cpu())


def load_moments(zero: Any, kept: Sequence[Fragment], read: Read) -> None:
    """Give each partition its state; padding at its end stays zero."""
    partitions = zero.single_partition_of_fp32_groups
    for group, partition in zip(zero.bit16_groups, partitions, strict=True):
        # One count serves a whole partition: every parameter takes every step.
        step = read(f"step/{zero.param_names[group[0]]}", Box((), ())).float()
        moments = {name: torch.zeros_like(partition) for name in MOMENTS}
        zero.optimizer.state[partition] = {"step": step.to(partition.device), **moments}
    for fragment in kept:
        state = zero.optimizer.state[fragment.partition]
        for name in MOMENTS:
            for box, place in fragment.boxes():
                state[name][place] = read(f"{name}/{fragment.owned.name}", box).flatten()
