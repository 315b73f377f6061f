"""The best plan: valid, the fastest that fits, and with reasons for the others."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.planner.assumptions import Assumptions
from cluster.planner.candidates import Wishes, layouts, ways, zeros
from cluster.planner.devices import Cluster, machine
from cluster.planner.equal_cost import equal_cost
from cluster.planner.job import Choice, Job, check
from cluster.planner.search import best_layout, make_plan, search, why_lost
from gptmoe.errors import LayoutError
from gptmoe.model.presets import preset
from gptmoe.model.spec import ModelSpec, RouterSpec, expand_experts
from gptmoe.parallel.layout import Layout

MIXTURE = Job(spec=preset("1.3B+MoE-64").spec, batch_sequences=512, seq_len=2048)
DENSE = Job(spec=preset("1.3B").spec, batch_sequences=512, seq_len=2048)
TINY = Job(
    spec=ModelSpec(
        num_layers=4,
        d_model=96,
        num_heads=12,
        d_ff=384,
        vocab_size=3072,
        num_experts=(12, 12),
        router=RouterSpec(group_sequences=4),
    ),
    batch_sequences=48,
    seq_len=64,
    dtype="float32",
)


def cluster(devices: int, name: str = "a100-80gb") -> Cluster:
    return machine(name).cluster(devices)


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    heads = draw(st.integers(1, 8))
    layers = draw(st.integers(1, 6))
    experts = draw(st.sampled_from([0, 4, 6, 8]))
    group = draw(st.sampled_from([1, 2, 4]))
    spec = ModelSpec(
        num_layers=layers,
        d_model=16 * heads,
        num_heads=heads,
        d_ff=draw(st.sampled_from([48, 64, 96])),
        vocab_size=100,
        num_experts=expand_experts(experts, layers, 2),
        router=RouterSpec(group_sequences=group),
    )
    return Job(spec=spec, batch_sequences=group * draw(st.integers(1, 12)), seq_len=48)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(jobs(), st.integers(1, 16), st.integers(1, 8))
def test_every_candidate_is_valid(job: Job, most: int, node: int) -> None:
    wishes, seen = Wishes(), 0
    for layout in layouts(job, wishes, most, node):
        assert layout.world <= most
        for size, schedule, chunks in ways(job, layout, wishes):
            for zero in zeros(job, layout, wishes):
                choice = Choice(
                    layout=replace(layout, chunks=chunks),
                    microbatch_size=size,
                    schedule=schedule,
                    zero=zero,
                )
                check(job, choice)
                seen += 1
    assert seen


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(jobs(), st.integers(1, 16), st.sampled_from(["cpu", "h100-80gb"]))
def test_the_best_is_valid_fits_and_is_the_fastest(job: Job, devices: int, name: str) -> None:
    answer = search(job, cluster(devices, name))
    best = answer.best
    check(job, best.choice)
    assert best.fits
    assert best.choice.layout.world <= devices
    assert best.memory.total == pytest.approx(sum(best.memory.items().values()))
    for lost in answer.runners_up:
        assert lost.reason
        assert not lost.plan.fits or lost.plan.time.total >= best.time.total * 0.999


def test_one_device() -> None:
    layout = search(DENSE, cluster(1)).best.choice.layout
    assert layout == Layout()


@pytest.mark.parametrize("devices", [1, 2, 3, 5, 6, 7, 8, 12, 16])
def test_whatever_the_number_of_workers_there_is_a_layout(devices: int) -> None:
    layout = best_layout(TINY, devices)
    assert layout.world <= devices
    check(TINY, Choice(layout=layout, microbatch_size=4))


def test_surplus_ranks_stay_idle() -> None:
    fixed = Wishes(microbatch_size=4, pp=1, tp=1)
    assert [best_layout(TINY, n, wishes=fixed).dp for n in (1, 2, 3, 4, 5, 6, 7)] == [
        1, 2, 3, 4, 4, 6, 6,
    ]  # fmt: skip


def test_wishes_hold() -> None:
    wishes = Wishes(dp=2, tp=2, ep=4, pp=2, zero=1, recompute="full", microbatch_size=16)
    choice = search(MIXTURE, cluster(8, "h200-141gb"), wishes).best.choice
    assert replace(choice.layout, chunks=1) == Layout(dp=2, tp=2, ep=4, pp=2)
    assert (choice.zero, choice.recompute, choice.microbatch_size) == (1, "full", 16)
    gpipe = search(DENSE, cluster(8), Wishes(pp=4, schedule="gpipe")).best.choice
    assert (gpipe.schedule, gpipe.layout.pp) == ("gpipe", 4)
    rounds = search(DENSE, cluster(8), Wishes(pp=4, schedule="interleaved", chunks=3)).best.choice
    assert (rounds.schedule, rounds.layout.chunks) == ("interleaved", 3)
    assert search(DENSE, cluster(8), Wishes(zero=3)).best.choice.zero == 3
    assert search(DENSE, cluster(2), Wishes(schedule="1f1b")).best.choice.schedule == "1f1b"


def test_a_fixed_choice_is_priced_the_same_by_search_and_alone() -> None:
    best = search(MIXTURE, cluster(16)).best
    assert make_plan(MIXTURE, best.choice, cluster(16), Assumptions()) == best


def test_recompute_is_chosen_only_if_memory_asks_for_it() -> None:
    roomy = cluster(8, "h200-141gb")
    assert search(DENSE, roomy).best.choice.recompute == "none"
    tight = replace(roomy, device=replace(roomy.device, memory_bytes=36e9))
    wishes = Wishes(dp=8, microbatch_size=16)
    assert search(DENSE, tight, wishes).best.choice.recompute == "full"


def test_slow_networks_keep_tensor_parallelism_in_the_node() -> None:
    for lost in search(MIXTURE, cluster(32)).runners_up:
        assert lost.plan.choice.layout.tp <= 8


def test_losers_have_reasons_of_both_kinds() -> None:
    answer = search(MIXTURE, cluster(8))
    reasons = [lost.reason for lost in answer.runners_up]
    assert any("slower: " in reason for reason in reasons)
    assert any("needs " in reason and " of it " in reason for reason in reasons)
    idle = search(TINY, cluster(4, "cpu")).runners_up
    assert any("more idle" in lost.reason for lost in idle)


def test_equals_are_named_so() -> None:
    job = Job(spec=preset("0.125B").spec, batch_sequences=512, seq_len=2048)
    plan = search(job, cluster(1)).best
    from_far = replace(plan, choice=replace(plan.choice, microbatch_size=1))
    assert why_lost(from_far, plan) == "as fast, but less plain"


def test_four_thousand_devices() -> None:
    best = search(MIXTURE, cluster(4096)).best
    assert best.fits
    assert 1024 <= best.choice.layout.world <= 4096


def test_equal_cost() -> None:
    bases = {name: preset(name).spec for name in ("0.76B", "1.3B", "2.7B")}
    found = equal_cost(DENSE, bases, cluster(8), tolerance=0.15)
    assert found.equal
    totals = [sparse.count.total for sparse in found.equal]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > 3 * found.dense_count.total
    assert all(abs(sparse.cost - 1) <= 0.15 for sparse in found.equal)
    assert all(abs(sparse.cost - 1) > 0.15 for sparse in found.nearest)
    assert all(sparse.plan.fits for sparse in (*found.equal, *found.nearest))
    assert "1.3B+MoE-256" in found.too_large
    affordable = [s for s in (*found.equal, *found.nearest) if s.cost <= 1.15]
    assert found.most
    assert found.most.count.total == max(sparse.count.total for sparse in affordable)
    assert not any(sparse.name.startswith("2.7B") for sparse in (*found.equal, *found.nearest))


def test_equal_cost_wants_a_dense_model() -> None:
    with pytest.raises(LayoutError, match="the model has 768 experts; name a dense one"):
        equal_cost(MIXTURE, {}, cluster(8))
