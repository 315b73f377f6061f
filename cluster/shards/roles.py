"""What a shard owns, as the control protocol says it and as the model core does. No torch."""

from cluster.messages import ExpertRange, Shard
from gptmoe.shard.parts import ExpertSpan, Part


def message_of(part: Part) -> Shard:
    """A part of a model as a message."""
    return Shard(
        stage=part.stage,
        layers=part.layers,
        slice=part.slice,
        slices=part.slices,
        experts=tuple(ExpertRange(layer=e.layer, first=e.first, end=e.end) for e in part.experts),
        data=part.data,
        experts_only=part.experts_only,
    )


def part_of(shard: Shard) -> Part:
    """The part that a message names."""
    return Part(
        stage=shard.stage,
        layers=shard.layers,
        slice=shard.slice,
        slices=shard.slices,
        experts=tuple(ExpertSpan(e.layer, e.first, e.end) for e in shard.experts),
        data=shard.data,
        experts_only=shard.experts_only,
    )
