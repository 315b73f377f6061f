"""Who owns what of a served model: pure integers, no torch.

Attention follows a Layout (dp, tp, pp); experts may lie anywhere on their stage, on ranks of their
own too, and more than once. Ranks count the layout first, then the ranks that hold experts alone,
stage by stage. With dp=2, pp=2 and one expert rank a stage:

    stage 0: attention on ranks 0 1, experts on rank 4
    stage 1: attention on ranks 2 3, experts on rank 5
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from gptmoe.errors import LayoutError
from gptmoe.model.spec import ModelSpec
from gptmoe.parallel.layout import Layout, choices, divisors


@dataclass(frozen=True, slots=True, order=True)
class ExpertSpan:
    """Experts [first, end) of one MoE layer."""

    layer: int
    first: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one rank owns."""

    stage: int = 0
    layers: tuple[int, ...] = ()
    slice: int = 0
    slices: int = 1
    experts: tuple[ExpertSpan, ...] = ()
    data: int = 0
    experts_only: bool = False

    def experts_in(self, layer: int) -> tuple[int, ...]:
        """The experts of a layer that it holds, in order."""
        spans = [span for span in self.experts if span.layer == layer]
        return tuple(expert for span in spans for expert in range(span.first, span.end))


def arrange(
    spec: ModelSpec,
    *,
    dp: int = 1,
    tp: int = 1,
    ep: int = 1,
    pp: int = 1,
    expert_ranks: int = 0,
    hot: Iterable[ExpertSpan] = (),
) -> tuple[Part, ...]:
    """The part of each rank.

    With `expert_ranks` that many ranks a stage hold its experts, ep of them one copy; without, ep
    attention ranks hold one. `hot` experts lie on every rank that may hold experts of their layer.
    Raises LayoutError for numbers that do not divide.
    """
    if expert_ranks:
        layout = Layout(dp=dp, tp=tp, pp=pp)
        _check_expert_ranks(spec, ep, expert_ranks)
        layout.check_model(replace(spec, num_experts=()))
    else:
        layout = Layout(dp=dp, tp=tp, ep=ep, pp=pp)
        layout.check_model(spec)
    parts = [
        part_of_rank(spec, layout, rank, with_experts=not expert_ranks)
        for rank in range(layout.world)
    ]
    for stage in range(layout.pp):
        layers = layout.layer_chunks(spec.num_layers)[stage]
        parts += [
            Part(
                stage=stage,
                layers=tuple(layers),
                experts=_share(spec, layers, ep, index % ep),
                data=index,
                experts_only=True,
            )
            for index in range(expert_ranks)
        ]
    return tuple(_with_hot(part, tuple(hot), not expert_ranks) for part in parts)


def part_of_rank(spec: ModelSpec, layout: Layout, rank: int, *, with_experts: bool = True) -> Part:
    """What a rank of a layout owns, in training and in serving."""
    place = layout.place(rank)
    layers = layout.layers_of(rank, spec.num_layers)
    index = layout.expert_part(rank)[0] if with_experts else 0
    return Part(
        stage=place.stage,
        layers=layers,
        slice=place.slice,
        slices=layout.tp,
        experts=_share(spec, layers, layout.ep, index) if with_experts else (),
        data=place.data,
    )


def layout_of(parts: Sequence[Part]) -> Layout:
    """The layout of the attention ranks among the parts."""
    attention = [part for part in parts if not part.experts_only]
    stages = 1 + max(part.stage for part in attention)
    sizes = {part.stage: len(part.layers) for part in attention}
    return Layout(
        dp=1 + max(part.data for part in attention),
        tp=attention[0].slices,
        pp=stages,
        chunk_layers=tuple(sizes[stage] for stage in range(stages)) if stages > 1 else (),
        sequence_parallel=False,
    )


def stage_ranks(parts: Sequence[Part]) -> list[list[int]]:
    """The ranks of each stage, those with experts alone included: rows travel among them."""
    stages = 1 + max(part.stage for part in parts)
    return [
        [rank for rank, part in enumerate(parts) if part.stage == stage] for stage in range(stages)
    ]


def held(parts: Sequence[Part], layer: int, num_experts: int) -> list[tuple[int, ...]]:
    """The experts of a layer that each rank of its stage holds, by its place there.

    Raises LayoutError if nobody holds one of them.
    """
    places = [part.experts_in(layer) for part in parts if layer in part.layers]
    missing = set(range(num_experts)) - {expert for mine in places for expert in mine}
    if missing:
        raise LayoutError(f"no rank holds expert {min(missing)} of layer {layer}; plan again")
    return places


def travels(parts: Sequence[Part], layer: int, num_experts: int) -> bool:
    """Whether rows of a layer leave their rank: not where each attention rank has all experts."""
    stage = [part for part in parts if layer in part.layers and not part.experts_only]
    return any(len(part.experts_in(layer)) < num_experts for part in stage)


def _share(
    spec: ModelSpec, layers: Iterable[int], parts: int, index: int
) -> tuple[ExpertSpan, ...]:
    counts = {layer: spec.experts_in_layer(layer) for layer in layers}
    return tuple(
        ExpertSpan(layer, count * index // parts, count * (index + 1) // parts)
        for layer, count in counts.items()
        if count
    )


def _with_hot(part: Part, hot: Sequence[ExpertSpan], everywhere: bool) -> Part:
    if not (everywhere or part.experts_only):
        return part
    held = {span.layer: set(part.experts_in(span.layer)) for span in part.experts}
    for span in hot:
        if span.layer in held:
            held[span.layer] |= set(range(span.first, span.end))
    spans = tuple(span for layer, ids in held.items() for span in _spans(layer, sorted(ids)))
    return replace(part, experts=spans)


def _spans(layer: int, experts: Sequence[int]) -> list[ExpertSpan]:
    spans: list[ExpertSpan] = []
    for expert in experts:
        if spans and spans[-1].end == expert:
            spans[-1] = replace(spans[-1], end=expert + 1)
        else:
            spans.append(ExpertSpan(layer, expert, expert + 1))
    return spans


def _check_expert_ranks(spec: ModelSpec, ep: int, expert_ranks: int) -> None:
    if min(ep, expert_ranks) < 1:
        raise LayoutError(
            f"parallel.ep={ep} and parallel.expert_ranks={expert_ranks} must be at least 1"
        )
    if not spec.num_experts:
        raise LayoutError(
            f"parallel.expert_ranks={expert_ranks} needs experts, but the model is dense; use 0"
        )
    if expert_ranks % ep:
        raise LayoutError(
            f"parallel.ep={ep} must divide parallel.expert_ranks={expert_ranks}; "
            f"use {choices(divisors(expert_ranks))}"
        )
    for count in sorted(set(spec.num_experts)):
        if count % ep:
            raise LayoutError(
                f"parallel.ep={ep} must divide num_experts={count}; use {choices(divisors(count))}"
            )
