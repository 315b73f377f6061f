"""The numbers of a step, by hand."""

import math
import time

import pytest
import torch

from gptmoe.metrics import CATALOGUE
from gptmoe.model.routing import Statistics
from train import report


def statistics(
    load: list[int], dropped: int = 0, entropy: float = 0.0, unrouted: int = 0
) -> Statistics:
    return Statistics(
        load_E=torch.tensor(load),
        dropped=torch.tensor(dropped),
        tokens=torch.tensor(sum(load)),
        entropy=torch.tensor(entropy),
        unrouted=torch.tensor(unrouted),
        cutoff_E=torch.arange(len(load)).double(),
        groups=torch.tensor(1),
    )


def test_load_is_judged_by_the_worst_layer_and_counted_over_all() -> None:
    layers = {1: statistics([4, 4, 0, 0], 2, 8.0, 2), 3: statistics([2, 2, 2, 2], 1, 4.0)}
    values = report.expert_load(layers)
    assert values == {
        "load_max_over_mean": 2.0,
        "dropped_ratio": 3 / 16,
        "unrouted_ratio": 2 / 16,
        "dead_experts": 2.0,
        "router_entropy": 12 / 16,
        "expert_load": [6, 6, 2, 2],
        "moe_layers": [1, 3],
        "layer_expert_load": [[4, 4, 0, 0], [2, 2, 2, 2]],
        "layer_load_max_over_mean": [2.0, 1.0],
        "layer_dropped_ratio": [2 / 8, 1 / 8],
        "layer_unrouted_ratio": [2 / 8, 0.0],
        "layer_dead_experts": [2, 0],
        "layer_router_entropy": [1.0, 0.5],
    }
    assert set(values) <= set(CATALOGUE)
    assert all(type(count) is int for count in values["expert_load"])  # type: ignore[union-attr]


def test_layers_of_different_sizes_have_no_common_list() -> None:
    values = report.expert_load({1: statistics([4, 4]), 3: statistics([2, 2, 2, 2])})
    assert "expert_load" not in values
    assert values["load_max_over_mean"] == 1.0


def test_a_layer_without_tokens_divides_by_nothing() -> None:
    values = report.expert_load({0: statistics([0, 0])})
    assert all(math.isfinite(value) for value in values.values() if isinstance(value, float | int))
    assert values["dead_experts"] == 2.0


def test_statistics_are_summed_over_ranks_in_one_message() -> None:
    messages = []

    def twice(tensor: torch.Tensor) -> torch.Tensor:
        messages.append(tensor)
        return 2 * tensor

    total = report.reduce(statistics([3, 1], 2, 0.5, 1), twice)
    assert len(messages) == 1
    assert total.load_E.tolist() == [6, 2]
    assert total.cutoff_E.tolist() == [0.0, 2.0]
    assert (int(total.dropped), int(total.tokens), float(total.entropy)) == (4, 8, 1.0)
    assert (int(total.unrouted), int(total.groups)) == (2, 2)


def test_speed_is_tokens_over_wall_time() -> None:
    values = report.speed(1000, time.perf_counter() - 2.0, 0.5, 0.5)
    assert values["step_s"] == pytest.approx(2.0, abs=0.1)
    assert values["tokens_per_s"] == pytest.approx(500, rel=0.1)
    assert values["data_wait_s"] == 0.5
    assert values["all_to_all_share"] == pytest.approx(0.25, rel=0.1)
    assert "all_to_all_share" not in report.speed(1000, time.perf_counter() - 2.0, 0.5, None)
    assert 2**24 < values["memory_peak_bytes"] < 2**44  # type: ignore[operator]


def test_position_counts_samples_tokens_and_epochs() -> None:
    assert report.position(5, 16, 24, 40) == {"tokens": 1920, "samples": 80, "epoch": 2}
    assert report.position(1, 16, 24, 40)["epoch"] == 0
