"""train.elastic: the layout for the workers that there are."""

import re
from dataclasses import replace

import pytest

from cluster.planner.devices import CPU
from gptmoe import config as configs
from gptmoe.errors import ConfigError, LayoutError
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.parallel.layout import Layout
from tests.train.conftest import TINY
from train.config import TrainConfig
from train.elastic import fit
from train.memory import predicted

SPEC = ModelSpec(num_layers=4, d_model=64, num_heads=4, d_ff=128, num_experts=(4, 8))
"""Its routing groups are larger than the run's microbatch: no plan for it."""
PLANNED = replace(SPEC, num_experts=(12, 12), router=RouterSpec(group_sequences=4))


def asked(*words: str) -> TrainConfig:
    return configs.load(TrainConfig, TINY, ["run.dir=x", *words])


def layout_for(config: TrainConfig, workers: int) -> Layout:
    return fit(config, SPEC, workers).parallel.layout()


def test_enough_workers_change_nothing() -> None:
    config = asked("parallel.dp=4", "parallel.ep=2")
    assert fit(config, SPEC, 4) is config
    assert fit(config, SPEC, 7) is config


@pytest.mark.parametrize(
    ("words", "workers", "expected"),
    [
        (["dp=4", "ep=2"], 3, Layout(dp=2, ep=2)),  # three do not divide the batch
        (["dp=4", "ep=2"], 1, Layout()),
        (["dp=4", "ep=4"], 2, Layout(dp=2, ep=2)),
        (["dp=2", "tp=2"], 3, Layout(tp=2)),
        (["dp=2", "tp=2", "ep=4"], 2, Layout(tp=2, ep=2)),
        (["dp=2", "pp=2"], 2, Layout(pp=2)),
        (["pp=2", "chunks=2", "schedule=interleaved"], 1, Layout()),
    ],
)
def test_where_the_planner_knows_none_the_nearest_layout_is_taken(
    words: list[str], workers: int, expected: Layout
) -> None:
    config = asked(*(f"parallel.{word}" for word in words))
    found = fit(config, SPEC, workers)
    assert found.parallel.layout() == expected
    assert found.batch_sequences == config.batch_sequences


def test_the_fewest_workers_need_not_all_be_used() -> None:
    """Three are there, as asked; the batch can be shared by two, and one stays idle."""
    config = asked("parallel.dp=4", "parallel.ep=2", "parallel.min_workers=3")
    assert layout_for(config, 3) == Layout(dp=2, ep=2)


def test_fewer_workers_get_the_planners_layout() -> None:
    """Three workers are all used, though the run asks for an even number of expert ranks."""
    config = asked("parallel.dp=4", "parallel.ep=2", "train.recompute=sel")
    found = fit(config, PLANNED, 3)
    assert found.parallel.layout().world == found.parallel.layout().dp == 3
    assert replace(found, parallel=config.parallel) == config


def test_the_planner_heeds_the_memory_of_a_worker() -> None:
    config = asked("parallel.dp=6")
    spec = replace(PLANNED, d_model=1536, num_heads=12, d_ff=6144, num_layers=12, num_experts=())
    whole = replace(config, parallel=replace(config.parallel, dp=4))
    assert predicted(whole, spec).total > 4e9
    small = replace(CPU, device=replace(CPU.device, memory_bytes=4e9))
    found = fit(config, spec, 4, small)
    assert found.parallel.tp * found.parallel.pp > 1
    assert predicted(found, spec).total < 4e9


@pytest.mark.parametrize("workers", range(1, 8))
def test_whatever_is_chosen_can_train_the_run(workers: int) -> None:
    config = asked("parallel.dp=4", "parallel.tp=2", "parallel.ep=2")
    found = fit(config, SPEC, workers)
    assert found.parallel.layout().world <= workers
    found.check_model(SPEC, 0)


def test_a_run_that_no_layout_fits_says_so() -> None:
    config = asked("parallel.dp=2", "parallel.ep=2")
    odd = ModelSpec(num_layers=4, d_model=64, num_heads=4, d_ff=128, max_seq_len=8)
    with pytest.raises(LayoutError, match=re.escape("1 workers cannot train this run, which asks")):
        fit(config, odd, 1)  # its sequences are longer than this model's


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.min_workers=0"], "parallel.min_workers=0 must be at least 1"),
        (
            ["parallel.dp=2", "parallel.min_workers=3"],
            "parallel.min_workers=3 is more than the layout's 2 workers; "
            "use fewer or a larger parallel.dp",
        ),
        (
            ["parallel.pp=2", "parallel.zero=2"],
            "parallel.zero=2 reduces gradients after each microbatch, which the stages of "
            "parallel.pp=2 still add to; use parallel.zero=1 or parallel.pp=1",
        ),
        (["run.max_failures=-2"], "run.max_failures=-2 must be at least -1"),
        (["run.hang_s=-1"], "run.hang_s=-1.0 must be at least 0"),
    ],
)
def test_wrong_values_are_refused(words: list[str], message: str) -> None:
    with pytest.raises((ConfigError, LayoutError), match=f"^{re.escape(message)}$"):
        asked(*words)
