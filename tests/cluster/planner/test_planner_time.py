"""Seconds of a step: formulas by hand, and how they change with the layout."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.planner import compute, links
from cluster.planner.assumptions import Assumptions
from cluster.planner.devices import CPU, Cluster, machine
from cluster.planner.job import Choice, Job
from cluster.planner.search import make_plan
from cluster.planner.stages import stages
from cluster.planner.step_time import bubble_fraction, sent_bytes, step_time
from gptmoe.model.presets import preset
from gptmoe.model.spec import RouterSpec
from gptmoe.parallel.layout import Layout
from gptmoe.parallel.schedules import Kind

DENSE = Job(spec=preset("1.3B").spec, batch_sequences=512, seq_len=2048)
MIXTURE = Job(spec=preset("1.3B+MoE-64").spec, batch_sequences=512, seq_len=2048)
IDEAL = Assumptions(link_efficiency=1.0)
A100 = machine("a100-80gb")


def choose(size: int = 8, dp: int = 1, tp: int = 1, ep: int = 1, pp: int = 1) -> Choice:
    return Choice(layout=Layout(dp=dp, tp=tp, ep=ep, pp=pp), microbatch_size=size)


def test_operations_are_those_of_the_paper() -> None:
    """72 l h^2 (1 + s / 6 h + V / 12 l h) a token: arXiv 2205.05198, appendix A."""
    layers, width = 24, 2048
    paper = 72 * layers * width**2 * (1 + 2048 / (6 * width) + 51200 / (12 * layers * width))
    assert compute.model_flops_per_token(DENSE) == pytest.approx(paper)


def test_shared_layers_and_several_experts_a_token_are_counted() -> None:
    spec = MIXTURE.spec
    ffn = 4 * spec.d_model * spec.d_ff
    plain = compute.layer_flops(MIXTURE, 64)
    choosing = RouterSpec(kind="expert_choice", capacity_factor=2.0, residual_depth=3)
    more = compute.layer_flops(replace(MIXTURE, spec=replace(spec, router=choosing)), 64)
    assert more == pytest.approx(plain + (2 - 1 + 3) * ffn)
    mixed = compute.layer_flops(replace(MIXTURE, spec=replace(spec, residual_moe=True)), 64)
    assert mixed == pytest.approx(plain + ffn + 4 * spec.d_model)
    dense = replace(MIXTURE, spec=replace(DENSE.spec, router=choosing))
    assert compute.model_flops_per_token(dense) == compute.model_flops_per_token(DENSE)


@pytest.mark.parametrize(
    ("pp", "chunks", "microbatches", "expected"),
    [(1, 1, 8, 0.0), (4, 1, 8, 3 / 8), (4, 1, 1, 3.0), (4, 3, 8, 1 / 8)],
)
def test_bubble(pp: int, chunks: int, microbatches: int, expected: float) -> None:
    assert bubble_fraction(pp, chunks, microbatches) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_a_step_has_the_bubble_of_its_schedule(schedule: Kind) -> None:
    chunks = 3 if schedule == "interleaved" else 1
    choice = replace(choose(pp=4), schedule=schedule, layout=Layout(pp=4, chunks=chunks))
    time = step_time(DENSE, choice, A100.cluster(4), IDEAL)
    assert time.bubble == pytest.approx(time.compute * 3 / (chunks * 64))


def test_rings_and_exchanges_by_hand() -> None:
    cluster = Cluster(
        num_devices=16,
        device=A100.device,
        devices_per_node=4,
        link_bytes_per_s=100.0,
        network_bytes_per_s=10.0,
        latency_s=0.0,
    )
    alone, inside, across, spread = (
        links.group_of(size, stride, cluster) for size, stride in ((1, 1), (4, 1), (16, 1), (4, 4))
    )
    assert (inside.in_node, across.in_node, spread.in_node) == (4, 4, 1)
    assert links.ring_s(1600.0, alone, cluster, IDEAL) == 0.0
    assert links.ring_s(1600.0, inside, cluster, IDEAL) == pytest.approx(1200 / 100)
    assert links.ring_s(1600.0, across, cluster, IDEAL) == pytest.approx(1500 / 40)
    assert links.ring_s(1600.0, spread, cluster, IDEAL) == pytest.approx(1200 / 10)
    assert links.exchange_s(1600.0, alone, cluster, IDEAL) == 0.0
    assert links.exchange_s(1600.0, inside, cluster, IDEAL) == pytest.approx(1200 / 100)
    assert links.exchange_s(1600.0, across, cluster, IDEAL) == pytest.approx(1200 / 10)


def test_what_a_rank_sends() -> None:
    sent = sent_bytes(MIXTURE, choose(dp=8, ep=8), Assumptions(expert_imbalance=1.0))
    rows = 8 * 2048 * 2048 * 2 * 7 / 8
    assert sent["expert"] == pytest.approx(8 * 12 * 4 * rows)  # microbatches, layers, both ways
    dense = sum(stage.sliced + stage.whole for stage in stages(MIXTURE.spec, 1))
    assert sent["gradients"] == pytest.approx(2 * 4 * dense * 7 / 8)
    assert (sent["tensor"], sent["sends"], sent["weights"]) == (0, 0, 0)
    table = 51200 * 2048
    ends = sent_bytes(DENSE, choose(pp=2), Assumptions())
    assert ends["gradients"] == pytest.approx(2 * 4 * table / 2)
    pipeline = sent_bytes(MIXTURE, choose(pp=4), Assumptions())
    assert pipeline["sends"] == pytest.approx(64 * 2 * 8 * 2048 * 2048 * 2)


def test_zero_3_gathers_weights_for_every_microbatch() -> None:
    choice = replace(choose(dp=8), zero=3)
    sent = sent_bytes(DENSE, choice, Assumptions())
    stage = stages(DENSE.spec, 1)[0]
    assert sent["weights"] == pytest.approx(8 * 3 * 4 * (stage.sliced + stage.whole) * 7 / 8)
    assert sent["gradients"] == 0
    narrow = sent_bytes(DENSE, choice, Assumptions(narrow_weights=True))
    assert narrow["weights"] == pytest.approx(sent["weights"] * 2 / 3)


def test_overlap_hides_a_share_of_the_gradients() -> None:
    full = step_time(DENSE, choose(dp=8), A100.cluster(8), Assumptions())
    half = step_time(DENSE, choose(dp=8), A100.cluster(8), Assumptions(overlap=0.5))
    assert half.gradients == pytest.approx(full.gradients / 2)


def test_recompute_costs_time() -> None:
    cluster = A100.cluster(8)
    plain = choose(dp=8)
    none, sel, full = (
        step_time(DENSE, replace(plain, recompute=kind), cluster, IDEAL).compute
        for kind in ("none", "sel", "full")
    )
    assert none < sel < full < none * 4 / 3 * 1.05


def test_zero_splits_the_optimizer_s_work() -> None:
    cluster = A100.cluster(8)
    plain = step_time(DENSE, choose(dp=8), cluster, IDEAL)
    split = step_time(DENSE, replace(choose(dp=8), zero=1), cluster, IDEAL)
    assert split.optimizer == pytest.approx(plain.optimizer / 8)


def test_a_tiny_layer_is_bound_by_its_kernels() -> None:
    tiny = Job(spec=preset("0.125B").spec, batch_sequences=1, seq_len=2)
    time = step_time(tiny, choose(1), A100.cluster(1), IDEAL)
    kernels = 12 * IDEAL.layer_kernels * A100.device.kernel_s
    assert kernels < time.compute < 2 * kernels


def test_small_models_use_less_of_the_peak() -> None:
    used = [
        make_plan(
            Job(spec=preset(name).spec, batch_sequences=512, seq_len=2048),
            choose(1),
            A100.cluster(1),
            Assumptions(),
        ).utilization
        for name in ("0.125B", "0.35B", "1.3B", "6.7B")
    ]
    assert used == sorted(used)
    assert 0.2 < used[0] < used[-1] < 0.76


@given(
    dp=st.sampled_from([1, 2, 4, 8]),
    tp=st.sampled_from([1, 2, 4, 8]),
    pp=st.integers(1, 24),
    name=st.sampled_from(["a100-80gb", "h100-80gb", "910b-64gb", "cpu"]),
)
def test_items_are_finite_and_add_up(dp: int, tp: int, pp: int, name: str) -> None:
    choice = choose(dp=dp, tp=tp, ep=dp * tp, pp=pp)
    time = step_time(MIXTURE, choice, machine(name).cluster(dp * tp * pp), Assumptions())
    assert time.total == pytest.approx(sum(time.items().values()))
    assert all(0 <= seconds < 1e6 for seconds in time.items().values())
    ideal_s = (
        compute.model_flops_per_token(MIXTURE)
        * MIXTURE.batch_tokens
        / (dp * tp * pp * machine(name).device.bfloat16_flops_per_s)
    )
    assert time.compute > ideal_s


def test_float32_uses_its_own_rate() -> None:
    slow = step_time(replace(DENSE, dtype="float32"), choose(), A100.cluster(1), IDEAL)
    assert slow.compute > 8 * step_time(DENSE, choose(), A100.cluster(1), IDEAL).compute
    assert CPU.device.flops_per_s("float32") < CPU.device.flops_per_s("bfloat16")
