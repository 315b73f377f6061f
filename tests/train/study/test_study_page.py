"""What a page says of made-up runs whose numbers are known."""

import dataclasses
from pathlib import Path

import matplotlib.image
import pytest

from tests.train.study.conftest import Configure
from train.study.arms import Variant
from train.study.curves import curves, over_seeds, thinned
from train.study.figure import draw
from train.study.page import page, summary
from train.study.plan import sized, table
from train.study.results import Results, RunResult
from train.study.targets import Finding, findings

DENSE, SWITCH, S_BASE = Variant("dense"), Variant("switch", 4), Variant("s_base", 4)
CHOICE = Variant("expert_choice", 4)
LOAD = {"max_over_mean": 1.5, "experts_per_token": 0.98, "unrouted": 0.18, "entropy": 1.2}
LATE = {
    "load_max_over_mean": 1.1, "dropped_ratio": 0.02, "unrouted_ratio": 0.3, "router_entropy": 1.0,
}  # fmt: skip


def run(losses: list[float], *, acausal: float | None = None, experts: bool = True) -> RunResult:
    """A run of 100 steps for each of its validations."""
    validation = tuple((100 * (i + 1), loss) for i, loss in enumerate(losses))
    return RunResult(
        validation=validation,
        training=validation,
        busiest=tuple((step, 1.2) for step, _ in validation) if experts else (),
        loss=losses[-1],
        acausal_loss=acausal,
        load=(LOAD,) if experts else (),
        late=LATE if experts else {},
        seconds=60.0,
    )


@pytest.fixture
def results(configure: Configure) -> Results:
    """Three seeds, each a bit worse than the one before, all differences nearly alike."""
    config = configure("study.seeds=[0,1,2]", "study.smooth=1")
    runs = {}
    for seed in range(3):
        worse, jitter = 0.2 * seed, 0.001 * seed
        runs |= {
            (DENSE, seed): run([6 + worse, 5 + worse, 4.5 + worse, 4 + worse], experts=False),
            (SWITCH, seed): run([5.5 + worse, 4.4 + worse, 4 + worse, 3.9 + worse]),
            (S_BASE, seed): run([5.5 + worse, 4.5 + worse, 4 + worse, 3.8 + worse + jitter]),
            (CHOICE, seed): run(
                [5.5 + worse, 3.9 + worse, 3.7 + worse, 3.6 + worse],
                acausal=3.595 + worse + jitter,
            ),
        }
    return Results(
        config=config,
        models=sized(config, 3072),
        runs=runs,
        speeds={
            "dense": (1000.0, 1010.0),
            "s_base-4, 8 iterations": (900.0,),
            "s_base-4, 50 iterations": (600.0,),
            "expert_choice-4": (990.0,),
        },
        missing=(),
        passes=0.1,
    )


def rows(found: list[Finding]) -> dict[str, tuple[str, str]]:
    return {finding.claim: (finding.found, finding.verdict.text) for finding in found}


def test_pairs_see_through_the_noise_of_seeds(results: Results) -> None:
    found = results.difference(CHOICE, DENSE)
    assert found is not None
    assert found.mean == pytest.approx(-0.4)
    assert found.high - found.low < 1e-9
    assert results.losses(DENSE) == pytest.approx([4.0, 4.2, 4.4])


def test_the_targets_by_hand(results: Results) -> None:
    found = rows(findings(results))
    # switch is at dense's 4.0 at step 300 of 400
    assert found["switch-4 comes to the final loss of dense in 1/1.3 of the steps"] == (
        "1.33 (1.33 to 1.33) times fewer", "reached",
    )  # fmt: skip
    # expert choice falls from 5.5 to 3.9 between 100 and 200: it is at 4.0 at 193.75
    assert found["expert_choice-4 comes to the final loss of dense in 1/1.3 of the steps"] == (
        "2.06 (2.06 to 2.06) times fewer", "reached",
    )  # fmt: skip
    for other in ("s_base", "switch"):
        claim = f"expert_choice-4, causal, is below {other}-4 throughout the second half"
        assert found[claim][1] == "reached"
    steps = found["expert_choice-4 comes to the final loss of s_base-4 in 1/1.48 of the steps"]
    assert steps[1] == "reached"
    (speed,) = [value for claim, value in found.items() if claim.startswith("throughput")]
    assert speed[0] == "1.10 times"
    (cost,) = [value for claim, value in found.items() if claim.startswith("thresholds")]
    assert cost == ("0.0040 (0.0015 to 0.0065) nats", "reached")


def test_a_loss_that_was_never_reached_is_missed(results: Results) -> None:
    runs = {**results.runs, (SWITCH, 1): run([6.0, 6.0, 6.0, 6.0])}
    found = rows(findings(dataclasses.replace(results, runs=runs)))
    text = found["switch-4 comes to the final loss of dense in 1/1.3 of the steps"]
    assert text[0].startswith("at most 1.21 (")
    assert text[0].endswith("times fewer (2 of 3 seeds came down to it)")
    assert "1 of 3 seeds never came down to it" in text[1]
    claim = "expert_choice-4, causal, is below switch-4 throughout the second half"
    assert found[claim][1].startswith("not carried by the interval at ")


def test_worse_is_said_with_where_and_by_how_much(results: Results) -> None:
    runs = dict(results.runs)
    for seed in range(3):
        runs[CHOICE, seed] = run([6.0, 5.0, 4.6 + 0.2 * seed, 3.5], acausal=3.4)
    found = rows(findings(dataclasses.replace(results, runs=runs)))
    claim = "expert_choice-4, causal, is below switch-4 throughout the second half"
    assert found[claim][1] == "missed by 0.6 nats at step 300"
    (cost,) = [value for claim, value in found.items() if claim.startswith("thresholds")]
    assert cost == ("0.1000 (0.1000 to 0.1000) nats", "missed by 0.09")


def test_the_page_has_every_part(results: Results) -> None:
    sizes = table(results.config, results.models, {"dense": 120.0})
    text = page(results, sizes, "gptmoe study routers small.toml")
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "# A study of routers", "## In short", "## Targets", "## Sizes",
        "## Validation loss by steps, causal routing", "## Steps to fixed losses",
        "## Expert choice: what later tokens would add", "## Throughput", "## Load",
        "## Arms and tuning",
    ]  # fmt: skip
    assert "![validation loss against steps and FLOPs, training loss, load](curves.png)" in text
    assert "`gptmoe study routers small.toml`" in text
    assert summary(results) in text
    assert "| s_base-4, 50 iterations | 600 | 600 to 600 | 0.67 |" in text
    assert "| switch-4 | 1.10 | 2.00% | 30.00% | 1.00 | 1.50 | 0.98 | 18.00% | 1.20 |" in text
    assert "| expert_choice-4 | 3.8000 | 3.7960 | 0.0040 (0.0015 to 0.0065) |" in text
    assert "Only here: `router.threshold_warmup=4`." in text
    assert "| dense | 6.200 | 5.200 | 4.700 | 4.200 |" in text
    assert "2.0 min" in text
    assert "learning by heart" not in text


def test_the_short_form_has_a_row_for_each_arm(results: Results) -> None:
    lines = summary(results).splitlines()
    assert len(lines) == 2 + 4
    assert lines[2] == "| dense | 4.200 |  |  |  | 1,010 |"
    assert lines[-1].startswith("| expert_choice-4 | 3.800 | -0.400 (-0.400 to -0.400) |")


def test_the_page_says_what_it_cannot_know(results: Results, configure: Configure) -> None:
    one = {key: it for key, it in results.runs.items() if key[1] == 0}
    alone = dataclasses.replace(
        results,
        config=configure("study.smooth=1"),
        runs=one,
        passes=90.0,
        missing=("switch-4, seed 1",),
        speeds={},
    )
    text = page(alone, table(alone.config, alone.models, {}), "gptmoe")
    assert "With one seed there are no intervals: no difference on this page is carried." in text
    assert "Each training sample was seen 90 times" in text
    assert "Not finished, and not on this page:** switch-4, seed 1." in text
    assert "Not measured yet." in text
    assert "| switch-4 | 3.900 | -0.100 | +0.100 | 1.33 |  |" in text
    assert "not carried: one seed has no interval" in text


def test_the_figure_is_drawn_from_plain_data(results: Results, tmp_path: Path) -> None:
    found = curves(results)
    assert [curve["name"] for curve in found] == [
        "dense",
        "switch-4",
        "s_base-4",
        "expert_choice-4",
    ]
    assert found[0]["validation"][-1] == (400, pytest.approx(4.2), 4.0, 4.4)
    assert found[0]["load"] == []
    draw(found, tmp_path / "curves.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "curves.png").shape
    assert (width, height) == (1320, 935)


def test_curves_are_thinned_to_means_of_parts() -> None:
    curve = [(step, float(step)) for step in range(1, 161)]
    thin = thinned(curve)
    assert len(thin) == 80
    assert thin[0] == (2, 1.5)
    assert over_seeds([[(1, 2.0), (2, 3.0)], [(1, 4.0)]]) == [(1, 3.0, 2.0, 4.0)]
