"""The planner's predictions against published training runs, side by side with the error.

    python -m tests.bench.bench_planner [--json FILE]

Each run is predicted from its model, layout and devices' data sheets with the same assumptions. An
error of +10 % says that the run was predicted 10 % slower than it was. Nothing is run here.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.planner.assumptions import Assumptions
from cluster.planner.search import Plan, make_plan
from tests.bench.published_runs import Run, published_runs

GOAL_MEDIAN = 0.15
GOAL_SHARE, GOAL_ERROR = 0.8, 0.3
"""So many of the runs within this error."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A run beside what was predicted for it."""

    run: Run
    plan: Plan

    @property
    def error(self) -> float:
        """Of the step time, relative: above 0 = predicted slower than measured."""
        return self.plan.time.total / self.run.step_s - 1


def predict(runs: Sequence[Run], assumptions: Assumptions) -> list[Prediction]:
    """The same assumptions for every run."""
    return [
        Prediction(run=run, plan=make_plan(run.job, run.choice, run.cluster, assumptions))
        for run in runs
    ]


def table(title: str, predictions: Sequence[Prediction]) -> str:
    """One line a run: step, tokens a second and device, utilisation, error."""
    lines = [
        title,
        f"{'':31}{'layout':25}{'measured':>10}{'predicted':>11}{'tokens/s/dev':>14}"
        f"{'MFU meas. pred.':>17}{'error':>8}  source",
    ]
    for each in predictions:
        run, layout = each.run, each.run.choice.layout
        where = f"dp{layout.dp} tp{layout.tp} ep{layout.ep} pp{layout.pp}"
        predicted_s = each.plan.time.total
        rate = run.job.batch_tokens / run.step_s / layout.world
        measured = each.plan.utilization * predicted_s / run.step_s
        lines.append(
            f"{run.name:31}{where:25}{run.step_s:>8.2f} s{predicted_s:>9.2f} s{rate:>14.0f}"
            f"{measured:>9.1%}{each.plan.utilization:>8.1%}{each.error:>+8.0%}  {run.source}"
        )
    return "\n".join(lines)


def summary(predictions: Sequence[Prediction]) -> str:
    """Of the errors."""
    errors = [each.error for each in predictions]
    near = sum(abs(error) <= GOAL_ERROR for error in errors)
    return (
        f"{len(errors)} runs: median error {statistics.median(errors):+.1%}, "
        f"median of its size {median_size(predictions):.1%}, "
        f"{near} within {GOAL_ERROR:.0%}, from {min(errors):+.0%} to {max(errors):+.0%}"
    )


def median_size(predictions: Sequence[Prediction]) -> float:
    """Half of the predictions are nearer than this."""
    return statistics.median(abs(each.error) for each in predictions)


def verdicts(predictions: Sequence[Prediction]) -> list[dict[str, object]]:
    """The goals and whether they are reached, with the runs behind them."""
    near = sum(abs(each.error) <= GOAL_ERROR for each in predictions) / len(predictions)
    size = median_size(predictions)
    errors = {each.run.name: each.error for each in predictions}
    return [
        {
            "title": f"median error at most {GOAL_MEDIAN:.0%}",
            "value": size,
            "reached": size <= GOAL_MEDIAN,
            "errors": errors,
        },
        {
            "title": f"{GOAL_SHARE:.0%} of the runs within {GOAL_ERROR:.0%}",
            "value": near,
            "reached": near >= GOAL_SHARE,
        },
    ]


def main() -> None:
    """Predict, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write errors and goals to this file")
    arguments = parser.parse_args()
    # Runs measured on this machine join here as a second list of Run, with a Cluster of its own.
    predictions = predict(published_runs(), replace(Assumptions(), narrow_weights=True))
    print(table("published runs", predictions))
    print(summary(predictions))
    if arguments.json:
        arguments.json.write_text(json.dumps(verdicts(predictions), indent=2), "utf-8")


if __name__ == "__main__":
    main()
