"""Expert choice, its residual and residual MoE on every kind of layout: one process's numbers."""

from dataclasses import replace

import pytest
import torch

from gptmoe.model.spec import RouterSpec
from gptmoe.parallel.layout import Layout
from tests.ranks.matrix import SPEC, assemble, describe, one_process
from tests.ranks.pool import RankPool
from tests.ranks.sgd import Case, Trained, train

CHOOSING = RouterSpec(
    kind="expert_choice",
    capacity_factor=1.0,
    group_sequences=2,
    threshold_decay=0.9,
    threshold_warmup=3,
    margin_coef=0.1,
    margin_anneal_decay=0.5,
)
"""Three steps in which experts choose, then three in which thresholds decide."""
CASES = {
    "expert choice": Case(spec=replace(SPEC, router=CHOOSING)),
    "expert choice without a residual, padding": Case(
        spec=replace(SPEC, router=replace(CHOOSING, residual_depth=0)), padded_from=2
    ),
    "residual MoE": Case(spec=replace(SPEC, residual_moe=True)),
    "residual MoE of experts that choose": Case(
        spec=replace(SPEC, residual_moe=True, router=replace(CHOOSING, residual_depth=2))
    ),
}
LAYOUTS = [
    Layout(dp=2),
    Layout(dp=2, ep=2),
    Layout(dp=4, ep=4),
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=False),
    Layout(dp=2, tp=2, ep=4),
    Layout(tp=2, ep=2, expert_tp=False, sequence_parallel=False),
    Layout(dp=2, tp=2, ep=2, expert_tp=True),
    Layout(dp=2, tp=2, ep=2, expert_tp=True, sequence_parallel=False),
    Layout(pp=2),
    Layout(tp=2, pp=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=describe)
@pytest.mark.parametrize("name", CASES)
def test_no_layout_changes_the_steps(pool: RankPool, name: str, layout: Layout) -> None:
    case, expected = CASES[name], one_process(CASES[name])
    found = pool.run(layout.world, train, layout, case)
    for rank in found:
        assert rank.losses == pytest.approx(expected.losses, rel=1e-8)
        assert rank.norms == pytest.approx(expected.norms, rel=1e-8)
        assert_same_state(rank, expected)
    torch.testing.assert_close(assemble(found), assemble([expected]), rtol=0, atol=1e-8)


@pytest.mark.parametrize("recompute", ["sel", "full"])
def test_recompute_and_microbatches_update_thresholds_once_and_alike(recompute: str) -> None:
    case = CASES["expert choice"]
    expected = one_process(case)
    again = replace(case, recompute=recompute, microbatch=2)
    found = train(0, Layout(), again)
    assert_same_state(found, expected)
    assert found.losses == pytest.approx(expected.losses, rel=1e-8)
    assert int(found.state["layers.1.ffn.router.updates"]) == case.steps


def assert_same_state(rank: Trained, expected: Trained) -> None:
    for name, values in rank.state.items():
        torch.testing.assert_close(values, expected.state[name], rtol=0, atol=1e-9)
