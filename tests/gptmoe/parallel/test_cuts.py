"""gptmoe.parallel.cuts: every element of every parameter has its owners, and one that speaks."""

import pytest

from gptmoe.checkpoint.boxes import Box, gaps, overlap
from gptmoe.model.spec import ModelSpec
from gptmoe.parallel.cuts import Cut, cut
from gptmoe.parallel.layout import Layout
from gptmoe.parallel.ownership import logical_shapes

SPEC = ModelSpec(
    num_layers=4, d_model=8, num_heads=4, d_ff=12, vocab_size=41, max_seq_len=8, num_experts=(4, 8)
)
SHAPES = logical_shapes(SPEC)
LAYOUTS = [
    Layout(dp=2, tp=2, pp=2, ep=4),
    Layout(dp=2, tp=2, pp=2, ep=2, expert_tp=True),
    Layout(dp=2, tp=4, ep=2, sequence_parallel=False),
    Layout(pp=4, dp=2),
    Layout(pp=2, chunks=2, tp=2),
]
QKV = "layers.2.attention.qkv.weight"


def cuts(name: str, layout: Layout) -> list[Cut]:
    return [cut(name, SHAPES[name], layout, rank, SPEC.num_layers) for rank in range(layout.world)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_those_that_speak_hold_every_element_once(layout: Layout) -> None:
    for index, (name, shape) in enumerate(SHAPES.items()):
        spoken = [
            box
            for held in cuts(name, layout)
            if held.is_first_copy and index % held.copies == held.turn
            for box in held.boxes
        ]
        assert not gaps(Box.whole(shape), spoken), name
        assert not overlap(spoken), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_box_is_held_by_its_copies_and_by_slices_and_stages_that_do_not_speak(
    layout: Layout,
) -> None:
    for name in SHAPES:
        held = [(c.boxes, c) for c in cuts(name, layout) if c.boxes]
        for boxes, one in held:
            same = [other for others, other in held if others == boxes]
            speaking = [other for other in same if other.is_first_copy]
            assert sorted(other.turn for other in speaking) == list(range(one.copies)), name


def test_queries_keys_and_values_are_cut_for_themselves() -> None:
    first, second = cuts(QKV, Layout(tp=2))
    assert first.boxes == (Box((0, 0), (4, 8)), Box((8, 0), (4, 8)), Box((16, 0), (4, 8)))
    assert [box.start[0] for box in second.boxes] == [4, 12, 20]


def test_an_uneven_vocabulary_is_cut_as_evenly_as_can_be() -> None:
    held = cuts("embed.tokens.weight", Layout(tp=4))
    assert [c.boxes[0].shape[0] for c in held] == [10, 10, 10, 11]


def test_the_token_table_lives_on_the_first_stage_and_as_the_head_on_the_last() -> None:
    first, middle, last = (cuts("embed.tokens.weight", Layout(pp=3))[rank] for rank in range(3))
    assert (first.is_tied, first.is_first_copy) == (True, True)
    assert middle.boxes == ()
    assert (last.is_tied, last.is_first_copy) == (True, False)
    assert not cuts("embed.tokens.weight", Layout(dp=2))[0].is_tied


@pytest.mark.parametrize(
    ("name", "sequence", "plain"),
    [
        ("layers.0.norm_ffn.weight", True, False),
        ("layers.0.ffn.down.bias", True, False),
        ("layers.0.ffn.up.bias", False, False),
        ("embed.positions.weight", True, False),
        ("layers.1.ffn.router.weight", True, True),
        ("layers.1.ffn.experts.down_bias", False, False),
    ],
)
def test_whose_gradients_are_parts(name: str, sequence: bool, plain: bool) -> None:
    assert cuts(name, Layout(tp=2))[1].is_partial is sequence
    assert cuts(name, Layout(tp=2, sequence_parallel=False))[1].is_partial is plain
    assert not cuts(name, Layout(dp=2))[1].is_partial


def test_the_bias_of_a_cut_experts_sum_is_seen_by_one_slice() -> None:
    held = cuts("layers.1.ffn.experts.down_bias", Layout(tp=2, expert_tp=True))
    assert [c.is_partial for c in held] == [True, True]
    assert [c.is_first_copy for c in held] == [True, False]
