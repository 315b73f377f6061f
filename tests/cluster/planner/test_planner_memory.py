"""Bytes of a rank: by hand on a small model, and how they change with the layout."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.planner.job import RECOMPUTES, Choice, Job
from cluster.planner.memory import Memory, fullest, in_flight, row_bound, stage_memory
from cluster.planner.stages import stages, unlike_stages
from gptmoe.model.counts import parameters
from gptmoe.model.presets import preset
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.parallel.layout import Layout
from gptmoe.parallel.schedules import Kind, most_alive, schedule

SMALL = ModelSpec(num_layers=2, d_model=4, num_heads=2, d_ff=16, vocab_size=10, max_seq_len=8)
MIXTURE = preset("1.3B+MoE-64").spec


def choose(
    microbatch_size: int = 8, zero: int = 0, dp: int = 1, tp: int = 1, ep: int = 1, pp: int = 1
) -> Choice:
    layout = Layout(dp=dp, tp=tp, ep=ep, pp=pp)
    return Choice(layout=layout, microbatch_size=microbatch_size, zero=zero)


def large_job() -> Job:
    return Job(spec=MIXTURE, batch_sequences=512, seq_len=2048)


def test_a_small_model_by_hand() -> None:
    job = Job(spec=SMALL, batch_sequences=2, seq_len=8, dtype="float32", fused_attention=False)
    memory = fullest(job, choose(microbatch_size=1))
    layer = 8 * 4 * (4 + 4) + 8 * 4 * 4 * (2 + 3 + 1) + 8 * 4 * 2 * 16  # norms; qkv; GELU
    core = 8 * 2 * 8 * 4  # tokens x heads x keys, float32
    assert memory.items() == {
        "weights": 4 * 568,
        "gradients": 4 * 568,
        "moments": 8 * 568,
        "master_copy": 0,
        "cast_weights": 0,
        "activations": 2 * (layer + core),
        "working": 2 * 8 * 4 * 16,
        "logits": 8 * 10 * (4 + 4 + 4),
        "buffers": 0,
    }
    assert memory.total == 16192
    assert memory.largest == "activations"


def test_experts_are_spread_over_ep_and_zero_splits_over_their_replicas() -> None:
    count = parameters(MIXTURE)
    expert = 12 * 64 * (2 * 2048 * 8192 + 8192 + 2048)
    plain = fullest(large_job(), choose(dp=16, ep=8))
    assert plain.weights == pytest.approx(4 * (count.total - expert + expert / 8))
    zero = fullest(large_job(), choose(dp=16, ep=8, zero=1))
    assert zero.moments == pytest.approx(8 * ((count.total - expert) / 16 + expert / 8 / 2))
    assert zero.master_copy == pytest.approx(zero.moments / 2)
    assert (zero.weights, zero.gradients) == (plain.weights, plain.gradients)
    split = fullest(large_job(), choose(dp=16, ep=8, zero=2))
    assert split.gradients == pytest.approx(zero.moments / 2)


def test_zero_3_keeps_a_share_and_gathers_one_matrix() -> None:
    job = Job(spec=preset("1.3B").spec, batch_sequences=512, seq_len=2048)
    total = parameters(job.spec).total
    memory = fullest(job, choose(dp=8, zero=3, microbatch_size=1))
    assert memory.weights == memory.gradients == memory.moments / 2 == 4 * total / 8
    table = 2048 * job.spec.vocab_size
    assert memory.cast_weights == 2 * table
    assert memory.buffers == (2 + 4) * table
    assert memory.master_copy == 0


@pytest.mark.parametrize("name", ["0.125B", "1.3B", "0.35B+MoE-64", "1.3B+MoE-32"])
@pytest.mark.parametrize("pp", [1, 2, 3, 5])
def test_stages_hold_every_parameter_once_and_the_head_again(name: str, pp: int) -> None:
    spec = preset(name).spec
    found = stages(spec, pp)
    held = sum(stage.sliced + stage.whole + stage.expert for stage in found)
    again = spec.vocab_size * spec.d_model if pp > 1 else 0
    assert held == parameters(spec).total + again
    assert sum(stage.layers for stage in found) == spec.num_layers
    assert unlike_stages(spec, pp)[0] == found[0]


@pytest.mark.parametrize("pp", [1, 2])
def test_stages_hold_shared_layers(pp: int) -> None:
    router = RouterSpec(kind="expert_choice", residual_depth=2)
    plain = replace(SMALL, num_layers=4, num_experts=(4, 8))
    for changes in ({"router": router}, {"residual_moe": True}):
        spec = replace(plain, **changes)
        found = stages(spec, pp)
        held = sum(stage.sliced + stage.whole + stage.expert for stage in found)
        assert held == parameters(spec).total + (40 if pp > 1 else 0)
        assert sum(stage.expert for stage in found) == sum(s.expert for s in stages(plain, pp))


def test_experts_that_choose_get_their_capacity_on_every_layout() -> None:
    spec = replace(MIXTURE, router=RouterSpec(kind="expert_choice", capacity_factor=1.5))
    assert [row_bound(spec, ep, 64, 2048) for ep in (1, 8)] == [1.5, 1.5]
    top2 = replace(MIXTURE, router=RouterSpec(kind="top2", capacity_factor=1.25))
    assert [row_bound(top2, ep, 64, 2048) for ep in (1, 2, 8)] == [2.0, 2.5, 2.5]


def test_chunks_deal_layers_out_in_rounds() -> None:
    first, second = stages(replace(SMALL, num_layers=4, num_experts=(4, 4)), 2, chunks=2)
    assert (first.experts, second.experts) == ((), (4, 4))  # layers 0, 2 and 1, 3


def test_microbatches_in_flight() -> None:
    job = large_job()
    deep = choose(pp=4)
    assert [in_flight(job, deep, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(job, replace(deep, schedule="gpipe"), 3) == 64
    # arXiv 2205.05198, section 4.2.3: L (1 + (pp - 1) / (pp v)) layers, pp of them 1F1B's
    rounds = replace(deep, schedule="interleaved", layout=Layout(pp=4, chunks=3))
    assert in_flight(job, rounds, 0) == pytest.approx(4 * (1 + 3 / (4 * 3)))


@pytest.mark.parametrize(("kind", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 3)])
@pytest.mark.parametrize("batch", [32, 512])
def test_microbatches_in_flight_are_those_of_the_schedule(
    kind: Kind, chunks: int, batch: int
) -> None:
    job = replace(large_job(), batch_sequences=batch)
    choice = replace(choose(pp=4), schedule=kind, layout=Layout(pp=4, chunks=chunks))
    for stage in range(4):
        actions = schedule(kind, 4, stage, choice.microbatches(job), chunks)
        assert in_flight(job, choice, stage) == pytest.approx(most_alive(actions) / chunks)


def test_gpipe_needs_more_than_1f1b() -> None:
    deep = choose(pp=4)
    gpipe = fullest(large_job(), replace(deep, schedule="gpipe"))
    assert gpipe.activations == 16 * fullest(large_job(), deep).activations


def test_a_fused_kernel_saves_the_scores() -> None:
    fused, plain = (replace(large_job(), fused_attention=flag) for flag in (True, False))
    saved = fullest(plain, choose()).activations - fullest(fused, choose()).activations
    assert saved == 24 * 8 * 2048 * 32 * (2048 * 2 - 4)


def test_dropout_keeps_masks() -> None:
    job = large_job()
    masked = replace(job, spec=replace(MIXTURE, dropout=0.1))
    more = fullest(masked, choose()).activations - fullest(job, choose()).activations
    assert more == 24 * 2 * 8 * 2048 * 2048


def test_capacity_bounds_the_rows_of_a_rank() -> None:
    job = large_job()
    spread = stage_memory(job, choose(dp=8, ep=8), stages(MIXTURE, 1)[0]).activations
    loose = replace(job, spec=replace(MIXTURE, router=RouterSpec(capacity_factor=2.0)))
    more = stage_memory(loose, choose(dp=8, ep=8), stages(MIXTURE, 1)[0]).activations - spread
    rows = 0.75 * 8 * 2048
    assert more == pytest.approx(12 * rows * 2 * (2 * 2048 + 2 * 8192))


def choices_of(job: Job) -> st.SearchStrategy[Choice]:
    """Layouts that divide this model's numbers."""
    return st.builds(
        lambda dp, tp, pp, ep, zero, size: Choice(
            layout=Layout(dp=dp, tp=tp, pp=pp, ep=min(ep, dp * tp)),
            microbatch_size=size,
            zero=zero,
        ),
        dp=st.sampled_from([1, 2, 4, 8]),
        tp=st.sampled_from([1, 2, 4, 8]),
        pp=st.integers(1, 12),
        ep=st.sampled_from([1, 2, 4, 8]),
        zero=st.sampled_from([0, 1]),
        size=st.sampled_from([8, 16]),
    )


@given(choices_of(large_job()))
def test_items_add_up_and_nothing_grows_with_more_ranks(choice: Choice) -> None:
    job = large_job()
    memory = fullest(job, choice)
    assert memory.total == pytest.approx(sum(memory.items().values()))
    assert all(value >= 0 for value in memory.items().values())
    layout = choice.layout
    wider = replace(choice, layout=replace(layout, tp=2 * layout.tp))
    for name in ("weights", "gradients", "moments", "activations", "logits"):
        assert getattr(fullest(job, wider), name) <= getattr(memory, name)


@given(choices_of(large_job()))
def test_recompute_keeps_less(choice: Choice) -> None:
    job = large_job()

    def kept(recompute: str) -> Memory:
        return fullest(job, replace(choice, recompute=recompute))

    none, sel, full = (kept(recompute) for recompute in RECOMPUTES)
    assert none.activations >= sel.activations >= full.activations
    assert none.cast_weights == sel.cast_weights >= full.cast_weights
    if choice.layout.pp <= 8:  # three layers a stage: one of them computed again costs less
        assert none.total >= sel.total >= full.total
