"""A step of the engine, cut up for the data ranks and the stages: pure functions.

Slot s of the engine is slot s // dp of data rank s % dp, so that neighbours share the work.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.messages import Copy as CopyMessage
from cluster.messages import Span as SpanMessage
from cluster.messages import Step
from gptmoe.generate.executor import ROW_MULTIPLE, tokens_of
from gptmoe.generate.plan import Span, StepPlan
from gptmoe.generate.slots import Copy

FIXED_ROWS = 16
"""Up to so many tokens a data rank, rows travel to experts in messages of one size."""

PIECE_TOKENS = 64
"""Prompts are cut for the stages of a pipeline into pieces of at least so many tokens."""


def pieces(plan: StepPlan, stages: int) -> list[StepPlan]:
    """Microbatches that keep several stages busy: about equal parts of the plan, in order.

    Decoding sequences stay together: a piece of them reads as many weights as all.
    """
    tokens = sum(span.count for span in plan.spans)
    count = min(stages, tokens // PIECE_TOKENS)
    if count < 2:
        return [plan]
    room = -(-tokens // count)
    result: list[StepPlan] = []
    spans = list(plan.spans[: plan.num_decoding])
    used, decoding = len(spans), len(spans)
    for span in plan.spans[plan.num_decoding :]:
        rest = span
        while used + rest.count > room and len(result) < count - 1:
            first, rest = _cut(rest, max(0, room - used))
            if first.count:
                spans.append(first)
            copies = () if result else plan.copies
            result.append(StepPlan(tuple(spans), decoding, plan.version, copies))
            spans, used, decoding = [], 0, 0
        if rest.count:
            spans.append(rest)
            used += rest.count
    return [*result, StepPlan(tuple(spans), decoding, plan.version)]


@dataclass(frozen=True, slots=True)
class Shares:
    """One step as each data rank gets it, and how their scores come together."""

    steps: tuple[Step, ...]
    """By data rank; epoch and sequence are those given."""
    order: tuple[int, ...]
    """Row numbers that put the data ranks' scores, one after the other, into the plan's order."""


def share(
    plan: StepPlan,
    tokens: Mapping[str, Sequence[int]],
    dp: int,
    *,
    epoch: int,
    sequence: int,
) -> Shares:
    """The plan's spans, dealt out by slot."""
    spans_of = [[span for span in plan.spans if span.slot % dp == data] for data in range(dp)]
    decoding = [
        sum(span.slot % dp == data for span in plan.spans[: plan.num_decoding])
        for data in range(dp)
    ]
    most = max(sum(span.count for span in spans) for spans in spans_of)
    most += -most % ROW_MULTIPLE  # as many rows as a rank computes, and sends to experts
    steps = tuple(
        Step(
            epoch=epoch,
            sequence=sequence,
            version=plan.version,
            spans=tuple(_message(span, dp) for span in spans),
            num_decoding=count,
            token_ids=tuple(tokens_of(spans, tokens)),
            most_rows=most,
            fixed=most <= FIXED_ROWS,
            copies=tuple(_copy(copy, dp) for copy in plan.copies if copy.source % dp == data),
        )
        for data, (spans, count) in enumerate(zip(spans_of, decoding, strict=True))
    )
    arrived = [key for spans in spans_of for span in spans for key in _outputs(span)]
    row_of = {key: row for row, key in enumerate(arrived)}
    wanted = [key for span in plan.spans for key in _outputs(span)]
    return Shares(steps, tuple(row_of[key] for key in wanted))


def _message(span: Span, dp: int) -> SpanMessage:
    return SpanMessage(
        slot=span.slot // dp, start=span.start, count=span.count, outputs=span.outputs
    )


def _cut(span: Span, count: int) -> tuple[Span, Span]:
    rest = span.count - count
    first = replace(span, count=count, outputs=max(0, span.outputs - rest))
    last = replace(span, start=span.start + count, count=rest, outputs=min(span.outputs, rest))
    return first, last


def _copy(copy: Copy, dp: int) -> CopyMessage:
    return CopyMessage(source=copy.source // dp, target=copy.target // dp, count=copy.count)


def _outputs(span: Span) -> list[tuple[int, int]]:
    """Names the rows of a span whose scores are wanted."""
    end = span.start + span.count
    return [(span.slot, place) for place in range(end - span.outputs, end)]
