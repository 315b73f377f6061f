"""Which experts to copy: those that make one shard wait for another."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.planner.hot import Proposal, propose, rows_answered, spans_of
from gptmoe.model.spec import ModelSpec
from gptmoe.shard.parts import ExpertSpan, arrange

SPEC = ModelSpec(num_layers=4, d_model=8, num_heads=1, d_ff=8, num_experts=(8, 8))
TWO = arrange(SPEC, ep=2, expert_ranks=2)


def test_one_hot_expert_is_copied() -> None:
    rows = {(1, expert): 10.0 for expert in range(8)} | {(1, 2): 100.0}
    assert propose(rows, TWO) == [Proposal(1, (2,), 130 / 85, 90 / 85)]


def test_an_even_load_needs_no_copies() -> None:
    assert propose({(1, expert): 10.0 for expert in range(8)}, TWO) == []


def test_a_single_shard_of_experts_needs_none() -> None:
    assert propose({(1, 0): 5.0}, arrange(SPEC, expert_ranks=1)) == []


def test_copies_go_to_shards_with_attention_if_these_hold_the_experts() -> None:
    rows = {(3, 0): 90.0, (3, 7): 10.0}
    assert [p.experts for p in propose(rows, arrange(SPEC, dp=2, ep=2))] == [(0,)]


@given(st.lists(st.integers(0, 1000), min_size=8, max_size=8), st.sampled_from([2, 4, 8]))
def test_copies_never_make_it_worse_and_reach_the_bound_if_any_can(
    counts: list[int], ranks: int
) -> None:
    rows = {(1, expert): float(count) for expert, count in enumerate(counts)}
    parts = arrange(SPEC, ep=ranks, expert_ranks=ranks)
    for proposal in propose(rows, parts):
        assert proposal.before > 1.2
        assert proposal.after < proposal.before
        whole = arrange(
            SPEC,
            ep=ranks,
            expert_ranks=ranks,
            hot=[ExpertSpan(1, e, e + 1) for e in proposal.experts],
        )
        assert propose(rows, whole) == [] or proposal.after > 1.2


def test_rows_of_all_shards_add_up() -> None:
    counters = [{"rows/1/2": 3.0, "weights_bytes": 9.0}, {"rows/1/2": 4.0, "rows/3/0": 1.0}]
    assert rows_answered(counters) == {(1, 2): 7.0, (3, 0): 1.0}


def test_hot_experts_are_written_as_layer_and_number() -> None:
    assert spans_of(["1:3", "3:0"]) == (ExpertSpan(1, 3, 4), ExpertSpan(3, 0, 1))
    assert str(Proposal(1, (2, 3), 1.5, 1.05)) == (
        '"1:2", "1:3" (busiest shard 1.50 -> 1.05 times the mean)'
    )
