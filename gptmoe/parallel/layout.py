"""The parallel layout: pure integers, no torch.

World = dp x tp x pp. A rank has a place (stage, data, slice): its pipeline stage, its part of the
batch, its slice of the weights. Ranks count slices first, then data, then stages, so that the ranks
of a tensor group, which talk most, are neighbours. With dp=2, tp=2, pp=2:

    stage 0: data 0 on ranks 0 1, data 1 on ranks 2 3
    stage 1: data 0 on ranks 4 5, data 1 on ranks 6 7

Experts are spread over all dp x tp ranks of a stage, ep of which together hold one copy of them:
with ep=2 ranks (0, 1) and (2, 3). With `expert_tp` they are cut by tensor parallelism like every
other weight, and spread over dp alone: (0, 2) and (1, 3).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from gptmoe.errors import LayoutError
from gptmoe.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands in the grid; each number counts from 0."""

    stage: int
    data: int
    slice: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How many ranks each kind of parallelism uses."""

    dp: int = 1
    """Data parallel: ranks with different samples."""
    tp: int = 1
    """Tensor parallel: ranks that hold slices of each weight."""
    ep: int = 1
    """Expert parallel: ranks that share the experts of a layer. Divides dp x tp."""
    pp: int = 1
    """Pipeline parallel: stages that hold different layers."""
    expert_tp: bool = False
    """Experts are cut by tp, too, instead of being spread over its ranks; ep then divides dp."""
    sequence_parallel: bool = True
    """With tp > 1: what lies between the sliced products works on slices of the sequence."""
    chunks: int = 1
    """Groups of consecutive layers on each stage, dealt out in turn; more than 1 interleaves."""
    chunk_layers: tuple[int, ...] = ()
    """Layers of each of the pp x chunks groups; () = as equal as can be."""
    sharded: bool = False
    """ZeRO 3: data ranks share the rows of every large weight. For dense models, with dp alone."""

    def __post_init__(self) -> None:
        for name in ("ep", "dp", "tp", "pp", "chunks"):  # dp may have been taken from ep
            if getattr(self, name) < 1:
                raise LayoutError(f"parallel.{name}={getattr(self, name)} must be at least 1")
        if self.expert_span % self.ep:
            span = "parallel.dp" if self.expert_tp or self.tp == 1 else "parallel.dp x parallel.tp"
            raise LayoutError(
                f"parallel.ep={self.ep} must divide {span}={self.expert_span}; "
                f"use {choices(divisors(self.expert_span))}"
            )
        if self.sharded and self.world * self.ep > self.dp:
            raise LayoutError(
                "parallel.zero=3 shares weights over parallel.dp alone, found "
                f"tp={self.tp} ep={self.ep} pp={self.pp}; use 1 for each, or parallel.zero=1"
            )

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.dp * self.tp * self.pp

    @property
    def expert_span(self) -> int:
        """Ranks of a stage over which its experts may be spread."""
        return self.dp if self.expert_tp else self.dp * self.tp

    def place(self, rank: int) -> Place:
        """Where `rank` stands."""
        others, slice_ = divmod(rank, self.tp)
        stage, data = divmod(others, self.dp)
        return Place(stage, data, slice_)

    def layer_chunks(self, num_layers: int) -> tuple[range, ...]:
        """The layers of each chunk in the order of the model; chunk c lies on stage c % pp."""
        parts = self.pp * self.chunks
        sizes = self.chunk_layers or tuple(
            num_layers * (index + 1) // parts - num_layers * index // parts
            for index in range(parts)
        )
        ends = list(accumulate(sizes))
        return tuple(range(end - size, end) for size, end in zip(sizes, ends, strict=True))

    def stage_of(self, layer: int, num_layers: int) -> int:
        """The stage that holds a layer."""
        chunks = self.layer_chunks(num_layers)
        return next(index for index, chunk in enumerate(chunks) if layer in chunk) % self.pp

    def layers_of(self, rank: int, num_layers: int) -> tuple[int, ...]:
        """The layers that `rank` holds."""
        chunks = self.layer_chunks(num_layers)[self.place(rank).stage :: self.pp]
        return tuple(layer for chunk in chunks for layer in chunk)

    def expert_part(self, rank: int) -> tuple[int, int]:
        """Which of the ep parts of its stage's experts `rank` holds, and which copy of that."""
        place = self.place(rank)
        column = place.data if self.expert_tp else place.data * self.tp + place.slice
        copy, index = divmod(column, self.ep)
        return index, copy

    def experts_of(self, rank: int, num_experts: int) -> tuple[int, int]:
        """First and last + 1 of the experts that `rank` owns in a layer of `num_experts`."""
        share = num_experts // self.ep
        first = self.expert_part(rank)[0] * share
        return first, first + share

    def check_layers(self, num_layers: int) -> None:
        """Raise LayoutError unless each stage gets its chunks of layers."""
        parts, sizes = self.pp * self.chunks, self.chunk_layers
        if self.chunks > 1 and self.pp == 1:
            raise LayoutError(
                f"parallel.chunks={self.chunks} cuts pipeline stages further, but parallel.pp=1; "
                "use parallel.chunks=1"
            )
        if parts > num_layers:
            raise LayoutError(
                f"parallel.pp={self.pp} x parallel.chunks={self.chunks} need as many layers, but "
                f"model.num_layers={num_layers}; use fewer"
            )
        if sizes and (len(sizes) != parts or sum(sizes) != num_layers or min(sizes) < 1):
            raise LayoutError(
                f"parallel.chunk_layers={list(sizes)} must be {parts} numbers above 0 (pp x "
                f"chunks) that add up to model.num_layers={num_layers}"
            )

    def check_model(self, spec: ModelSpec) -> None:
        """Raise LayoutError unless the ranks can share this model."""
        self.check_experts(spec.num_experts)
        if self.sharded and spec.num_experts:
            raise LayoutError(
                f"parallel.zero=3 is for dense models, but {len(spec.moe_layers)} layers have "
                "experts; spread these with parallel.ep and use parallel.zero=1 or 2"
            )
        self.check_layers(spec.num_layers)
        self.check_slices({"model.num_heads": spec.num_heads, "model.d_ff": spec.d_ff})

    def check_slices(self, sizes: Mapping[str, int]) -> None:
        """Raise LayoutError unless tp divides each of the named sizes."""
        for name, size in sizes.items():
            if size % self.tp:
                raise LayoutError(
                    f"parallel.tp={self.tp} must divide {name}={size}; "
                    f"use {choices(divisors(size))}"
                )

    def check_experts(self, num_experts: Sequence[int]) -> None:
        """Raise LayoutError unless ep divides every layer's number of experts."""
        if self.ep > 1 and not num_experts:
            raise LayoutError(
                f"parallel.ep={self.ep} needs experts, but the model is dense; use parallel.ep=1"
            )
        for count in sorted(set(num_experts)):
            if count % self.ep:
                good = [d for d in divisors(count) if all(n % d == 0 for n in num_experts)]
                raise LayoutError(
                    f"parallel.ep={self.ep} must divide num_experts={count}; use {choices(good)}"
                )

    def expert_groups(self) -> list[list[int]]:
        """Groups of ranks that together hold one copy of every expert of their stage."""

        def key(rank: int, place: Place) -> Hashable:
            return place.stage, place.slice if self.expert_tp else 0, self.expert_part(rank)[1]

        return self._groups(key)

    def replica_groups(self) -> list[list[int]]:
        """Groups of ranks that hold the same experts."""

        def key(rank: int, place: Place) -> Hashable:
            return place.stage, place.slice if self.expert_tp else 0, self.expert_part(rank)[0]

        return self._groups(key)

    def tensor_groups(self) -> list[list[int]]:
        """Groups of ranks that hold the slices of the same weights, for the same samples."""
        return self._groups(lambda rank, place: (place.stage, place.data))

    def data_groups(self) -> list[list[int]]:
        """Groups of ranks that hold the same slices, for different samples."""
        return self._groups(lambda rank, place: (place.stage, place.slice))

    def tied_groups(self) -> list[list[int]]:
        """Pairs of ranks that hold the same part of the token table: first and last stage."""
        return [[ranks[0], ranks[-1]] for ranks in self.pipelines() if len(ranks) > 1]

    def pipelines(self) -> list[list[int]]:
        """Groups of ranks that hold the stages, in order, for the same samples and slices."""
        return self._groups(lambda rank, place: (place.data, place.slice))

    def shards(self, shape: Sequence[int]) -> bool:
        """Whether data ranks share a weight's rows: matrices with at least a row for each."""
        return self.sharded and len(shape) == 2 and shape[0] >= self.dp

    def shard_sizes(self, rows: int) -> tuple[int, ...]:
        """Rows that each data rank keeps of a weight that is shared."""
        ends = [rows * (index + 1) // self.dp for index in range(self.dp)]
        return tuple(end - first for first, end in zip([0, *ends], ends, strict=False))

    def _groups(self, key: Callable[[int, Place], Hashable]) -> list[list[int]]:
        """Ranks with the same key, each group and the list of them in rank order."""
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for rank in range(self.world):
            groups[key(rank, self.place(rank))].append(rank)
        return list(groups.values())


def smallest_dp(ep: int, tp: int = 1, *, expert_tp: bool = False) -> int:
    """The fewest data ranks over which ep can spread experts."""
    return ep if expert_tp or min(ep, tp) < 1 else ep // math.gcd(ep, tp)


def divisors(number: int) -> list[int]:
    """The numbers that divide `number`, from 1 up."""
    return [d for d in range(1, number + 1) if number % d == 0]


def choices(numbers: Sequence[int]) -> str:
    """Numbers as a message offers them: `1, 2 or 4`."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
