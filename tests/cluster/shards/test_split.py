"""A step cut up for stages and data ranks: nothing is lost, nothing is done twice."""

from collections.abc import Mapping
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import Span as SpanMessage
from cluster.shards.split import FIXED_ROWS, PIECE_TOKENS, pieces, share
from gptmoe.generate.executor import ROW_MULTIPLE
from gptmoe.generate.plan import Span, StepPlan

Tokens = Mapping[str, list[int]]


def prompt(slot: int, count: int, start: int = 0, outputs: int = 1) -> Span:
    return Span(f"request {slot}", slot, start, count, outputs)


def decoding(slot: int, start: int = 9) -> Span:
    return prompt(slot, 1, start)


@st.composite
def plans(draw: st.DrawFn, most_tokens: int = 300) -> StepPlan:
    """Decoding sequences by slot, then prompts in any order."""
    slots = draw(st.lists(st.integers(0, 15), unique=True, min_size=1, max_size=8))
    num_decoding = draw(st.integers(0, len(slots)))
    spans = [decoding(slot) for slot in sorted(slots[:num_decoding])]
    for slot in slots[num_decoding:]:
        size = draw(st.integers(1, most_tokens))
        spans.append(prompt(slot, size, draw(st.integers(0, 50)), draw(st.booleans())))
    return StepPlan(tuple(spans), num_decoding, draw(st.integers(0, 3)))


def tokens_for(plan: StepPlan) -> Tokens:
    """Other token ids for each sequence and position."""
    return {
        span.key: [1000 * span.slot + place for place in range(span.start + span.count)]
        for span in plan.spans
    }


def places(plan: StepPlan) -> list[tuple[str, int]]:
    """Each token of a plan, in order."""
    return [
        (span.key, place)
        for span in plan.spans
        for place in range(span.start, span.start + span.count)
    ]


def sizes(parts: list[StepPlan]) -> list[int]:
    return [sum(span.count for span in part.spans) for part in parts]


def test_a_long_prompt_is_cut_for_the_stages() -> None:
    plan = StepPlan((decoding(0), decoding(3), prompt(1, 198, start=50)), 2)
    assert pieces(plan, 2) == [
        StepPlan((decoding(0), decoding(3), prompt(1, 98, 50, outputs=0)), 2),
        StepPlan((prompt(1, 100, 148),), 0),
    ]


def test_pieces_are_of_the_weights_of_their_plan() -> None:
    plan = StepPlan((prompt(0, 400),), 0, version=7)
    assert [piece.version for piece in pieces(plan, 4)] == [7] * 4


@pytest.mark.parametrize("stages", [1, 4])
def test_few_tokens_stay_together(stages: int) -> None:
    plan = StepPlan((decoding(0), prompt(1, 2 * PIECE_TOKENS - 2)), 1)
    assert pieces(plan, stages) == [plan]


def test_decoding_sequences_stay_together_even_if_they_are_more_than_a_part() -> None:
    many = tuple(decoding(slot) for slot in range(150))
    plan = StepPlan((*many, prompt(200, 50)), 150)
    assert pieces(plan, 3) == [StepPlan(many, 150), StepPlan((prompt(200, 50),), 0)]


@given(plan=plans(), stages=st.integers(1, 5))
def test_pieces_hold_each_token_once_and_in_order(plan: StepPlan, stages: int) -> None:
    parts = pieces(plan, stages)
    assert [place for part in parts for place in places(part)] == places(plan)
    assert all(span.count for part in parts for span in part.spans)
    first, *others = parts
    assert first.spans[: first.num_decoding] == plan.spans[: plan.num_decoding]
    assert [first.num_decoding, *(part.num_decoding for part in others)] == [
        plan.num_decoding,
        *[0] * len(others),
    ]
    assert {part.version for part in parts} == {plan.version}


@given(plan=plans(), stages=st.integers(1, 5))
def test_only_the_last_piece_of_a_span_samples(plan: StepPlan, stages: int) -> None:
    spans = [span for part in pieces(plan, stages) for span in part.spans]
    for span in plan.spans:
        *most, last = [piece.outputs for piece in spans if piece.key == span.key]
        assert not any(most)
        assert last == span.outputs


@given(plan=plans(), stages=st.integers(1, 5))
def test_pieces_are_as_many_as_stages_at_most_and_about_equal(plan: StepPlan, stages: int) -> None:
    parts = pieces(plan, stages)
    tokens = sum(sizes(parts))
    assert 1 <= len(parts) <= max(1, min(stages, tokens // PIECE_TOKENS))
    if len(parts) > 1:
        room = -(-tokens // min(stages, tokens // PIECE_TOKENS))
        *most, last = sizes(parts)
        assert set(most) == {room}
        assert last > room - stages


def test_spans_go_to_the_data_rank_of_their_slot() -> None:
    plan = StepPlan((decoding(1), decoding(4), prompt(2, 3), prompt(3, 5, outputs=0)), 2, 8)
    even, odd = share(plan, tokens_for(plan), 2, epoch=3, sequence=7).steps
    assert even.spans == (
        SpanMessage(slot=2, start=9, count=1, outputs=1),
        SpanMessage(slot=1, start=0, count=3, outputs=1),
    )
    assert odd.spans == (
        SpanMessage(slot=0, start=9, count=1, outputs=1),
        SpanMessage(slot=1, start=0, count=5, outputs=0),
    )
    assert even.token_ids == (4009, 2000, 2001, 2002)
    assert odd.token_ids == (1009, 3000, 3001, 3002, 3003, 3004)
    for step in (even, odd):
        assert (step.epoch, step.sequence, step.version) == (3, 7, 8)
        assert (step.num_decoding, step.most_rows, step.fixed) == (1, 8, True)


@given(plan=plans(most_tokens=20), dp=st.integers(1, 4))
def test_each_data_rank_gets_its_spans_with_their_tokens(plan: StepPlan, dp: int) -> None:
    tokens = tokens_for(plan)
    steps = share(plan, tokens, dp, epoch=1, sequence=1).steps
    assert len(steps) == dp
    for data, step in enumerate(steps):
        mine = [span for span in plan.spans if span.slot % dp == data]
        assert [span.slot * dp + data for span in step.spans] == [span.slot for span in mine]
        assert [(span.start, span.count, span.outputs) for span in step.spans] == [
            (span.start, span.count, span.outputs) for span in mine
        ]
        assert all(span.count == 1 for span in step.spans[: step.num_decoding])
        assert step.token_ids == tuple(
            tokens[name][place] for name, place in places(StepPlan(tuple(mine), 0))
        )
    assert sum(step.num_decoding for step in steps) == plan.num_decoding


@given(plan=plans(most_tokens=20), dp=st.integers(1, 4))
def test_order_puts_the_scores_of_data_ranks_into_the_order_of_the_plan(
    plan: StepPlan, dp: int
) -> None:
    shares = share(plan, tokens_for(plan), dp, epoch=1, sequence=1)
    arrived = []
    for step in shares.steps:
        ends = accumulate(span.count for span in step.spans)
        rows = zip(step.spans, ends, strict=True)
        arrived += [step.token_ids[end - 1] for span, end in rows if span.outputs]
    assert sorted(shares.order) == list(range(len(arrived)))
    assert [arrived[row] for row in shares.order] == [
        1000 * span.slot + span.start + span.count - 1 for span in plan.spans if span.outputs
    ]


@given(plan=plans(most_tokens=20), dp=st.integers(1, 4))
def test_rows_are_those_of_the_fullest_data_rank_with_its_padding(plan: StepPlan, dp: int) -> None:
    steps = share(plan, tokens_for(plan), dp, epoch=1, sequence=1).steps
    fullest = max(len(step.token_ids) for step in steps)
    (most,) = {step.most_rows for step in steps}
    assert most % ROW_MULTIPLE == 0
    assert fullest <= most < fullest + ROW_MULTIPLE
    assert {step.fixed for step in steps} == {most <= FIXED_ROWS}
