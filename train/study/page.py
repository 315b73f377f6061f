"""A study's page in Markdown: sizes, losses, steps, speed, load, and what of it holds."""

import statistics
from collections.abc import Iterator, Sequence

from .arms import ARMS, REFERENCE, Variant
from .corpus import MANY_PASSES
from .figure_files import FIGURE
from .plan import SINKHORN, Row
from .results import Results, RunResult
from .targets import findings, median, show, show_steps

_REFERENCES = (REFERENCE, "dense_2x", "s_base", "switch")
_QUARTERS = (0.25, 0.5, 0.75, 1.0)


def page(results: Results, sizes: Sequence[Row], command: str) -> str:
    """The whole page."""
    parts = [
        "# A study of routers",
        f"Made by `{command}`.",
        *_conditions(results),
        "## In short",
        summary(results),
        "## Targets",
        _targets(results),
        f"![validation loss against steps and FLOPs, training loss, load]({FIGURE})",
        "## Sizes",
        sizes_table(sizes),
        "Active FLOPs of a token's forward pass through all blocks: attention, feed-forward layers "
        "(residual and shared ones counted), routers. The output head costs the same in every arm "
        "and is in the last column only. Arms are fitted to `dense` by their d_ff; `dense_2x` has "
        "twice the layers, so that attention and feed-forward layers cost twice as much.",
        "## Validation loss by steps, causal routing",
        _by_steps(results),
        "## Steps to fixed losses",
        _steps(results),
        "## Expert choice: what later tokens would add",
        _acausal(results),
        "## Throughput",
        _throughput(results),
        "## Load",
        _load(results),
        "## Arms and tuning",
        *_arms(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(results: Results) -> str:
    """The short form: one row an arm."""
    rows = []
    for it in results.models:
        variant = it.variant
        if losses := results.losses(variant):
            speeds = results.speeds.get(variant.name) or results.speeds.get(
                f"{variant.name}, {SINKHORN[0]} iterations"
            )
            rows.append(
                [
                    variant.name,
                    f"{statistics.fmean(losses):.3f}",
                    _paired(results, variant, Variant(REFERENCE)),
                    _paired(results, variant, Variant("s_base", variant.experts)),
                    _speedup(results, variant, Variant(REFERENCE)),
                    f"{median(speeds):,.0f}" if speeds else "",
                ]
            )
    head = ["arm", "final loss", "against dense", "against s_base", "steps to dense's loss"]
    return _table([*head, "tokens/s"], rows)


def sizes_table(rows: Sequence[Row]) -> str:
    """Parameters, d_ff, FLOPs and time of each arm."""
    head = ["arm", "parameters", "active", "d_ff", "block FLOPs a token", "of its reference"]
    return _table(
        [*head, "with the head", "tokens a run", "estimated"],
        [
            [
                row.name,
                f"{row.parameters:,}",
                f"{row.active:,}",
                str(row.d_ff),
                f"{row.blocks_flops:,.0f}",
                f"{row.against_reference:.2%}",
                f"{row.total_flops:,.0f}",
                f"{row.tokens:,}",
                f"{row.estimated_s / 60:.1f} min" if row.estimated_s else "",
            ]
            for row in rows
        ],
    )


def _conditions(results: Results) -> Iterator[str]:
    study, train = results.config.study, results.config.train
    seeds = f"{len(study.seeds)} seeds" if len(study.seeds) > 1 else "1 seed"
    yield (
        f"{seeds}, {train.max_steps:,} steps of {train.batch_tokens:,} tokens, products in "
        f"{train.dtype}. Losses are nats a token on validation data **with causal routing**: as "
        "when the model generates, later tokens decide nothing. In brackets 95 % intervals "
        "(Student's t) of differences that are paired by seed: arms of one seed see the same "
        "samples in one order."
    )
    if len(study.seeds) == 1:
        yield "**With one seed there are no intervals: no difference on this page is carried.**"
    if results.passes > MANY_PASSES:
        yield (
            f"**Each training sample was seen {results.passes:.0f} times: losses here say more "
            "about learning by heart than about routers. Give a larger corpus (data.inputs).**"
        )
    if results.missing:
        yield f"**Not finished, and not on this page:** {'; '.join(results.missing)}."


def _targets(results: Results) -> str:
    rows = [
        [str(finding.target), finding.claim, finding.found, finding.verdict.text]
        for finding in findings(results)
    ]
    return _table(["target", "claim", "found", "verdict"], rows, "---")


def _by_steps(results: Results) -> str:
    found = [run for run in results.runs.values() if run.validation]
    steps = sorted({step for run in found for step, _ in run.validation})
    if not steps:
        return "No validation yet."
    marks = sorted({min(steps, key=lambda s: abs(s - steps[-1] * q)) for q in _QUARTERS})
    rows = []
    for it in results.models:
        runs = [results.runs[it.variant, seed] for seed in results.seeds_of(it.variant)]
        if runs:
            at = [statistics.fmean(dict(run.validation)[mark] for run in runs) for mark in marks]
            rows.append([it.variant.name, *(f"{loss:.3f}" for loss in at)])
    return _table(["arm", *(f"step {mark:,}" for mark in marks)], rows)


def _steps(results: Results) -> str:
    rows, done = [], [it.variant for it in results.models if results.losses(it.variant)]
    goals = [variant for variant in done if variant.arm in _REFERENCES]
    for variant in done:
        cells = [_speedup(results, variant, goal) if goal != variant else "" for goal in goals]
        rows.append([variant.name, *cells])
    table = _table(["arm", *(f"final loss of {goal.name}" for goal in goals)], rows)
    return table + (
        "\n\nTimes fewer steps than the named arm took; 2 means half of them. Read from curves "
        f"smoothed over {results.config.study.smooth} validations, between validations on a "
        "straight line."
    )


def _acausal(results: Results) -> str:
    rows = []
    for it in results.models:
        cost = results.acausal_cost(it.variant)
        if cost is None:
            continue
        runs = [results.runs[it.variant, seed] for seed in results.seeds_of(it.variant)]
        last = [statistics.fmean(loss for _, loss in run.training[-20:]) for run in runs]
        acausal = statistics.fmean(run.acausal_loss or 0.0 for run in runs)
        rows.append(
            [
                it.variant.name,
                f"{statistics.fmean(results.losses(it.variant)):.4f}",
                f"{acausal:.4f}",
                show(cost, 4),
                f"{statistics.fmean(last):.3f}",
            ]
        )
    if not rows:
        return "No arm of expert choice is finished."
    head = ["arm", "causal (thresholds)", "acausal, same weights", "causal minus acausal"]
    return _table([*head, "training loss, last 20 steps"], rows) + (
        "\n\nTraining looks at whole groups until router.threshold_warmup steps: its loss is that "
        "of other text and, until then, of a model that sees later tokens. Never compare it with "
        "another arm's."
    )


def _throughput(results: Results) -> str:
    if not results.speeds:
        return "Not measured yet."
    rows = []
    for name, speeds in results.speeds.items():
        experts = name.partition(",")[0].rpartition("-")[2]
        base = results.speeds.get(f"s_base-{experts}, {SINKHORN[0]} iterations")
        against = f"{median(speeds) / median(base):.2f}" if base else ""
        spread = f"{min(speeds):,.0f} to {max(speeds):,.0f}"
        rows.append([name, f"{median(speeds):,.0f}", spread, against])
    table = _table(["arm", "tokens/s", "of all rounds", "times s_base, 8 iterations"], rows)
    study = results.config.study
    threads = "1 thread" if study.threads == 1 else f"{study.threads} threads"
    return table + (
        f"\n\nTraining steps, one arm at a time on {threads}, {study.speed_rounds} "
        f"{'round' if study.speed_rounds == 1 else 'rounds'} in turns."
    )


def _load(results: Results) -> str:
    rows = []
    for it in results.models:
        runs = [results.runs[it.variant, seed] for seed in results.seeds_of(it.variant)]
        if runs and it.variant.experts:
            rows.append([it.variant.name, *_late(runs), *_judged(runs)])
    if not rows:
        return "No arm with experts is finished."
    training = ["max/mean", "dropped", "no expert", "entropy"]
    judged = ["max/mean", "experts a token", "no expert", "entropy"]
    head = [f"training: {name}" for name in training] + [f"evaluation: {n}" for n in judged]
    return _table(["arm", *head], rows) + (
        "\n\nBusiest expert over the mean of the worst layer (training) and as mean over layers "
        "(evaluation, causal routing, nothing dropped); shares of tokens; entropy in nats."
    )


def _late(runs: Sequence[RunResult]) -> list[str]:
    def mean(name: str) -> float:
        return statistics.fmean(run.late[name] for run in runs)

    return [
        f"{mean('load_max_over_mean'):.2f}",
        f"{mean('dropped_ratio'):.2%}",
        f"{mean('unrouted_ratio'):.2%}",
        f"{mean('router_entropy'):.2f}",
    ]


def _judged(runs: Sequence[RunResult]) -> list[str]:
    def mean(name: str) -> float:
        return statistics.fmean(layer[name] for run in runs for layer in run.load)

    return [
        f"{mean('max_over_mean'):.2f}",
        f"{mean('experts_per_token'):.2f}",
        f"{mean('unrouted'):.2%}",
        f"{mean('entropy'):.2f}",
    ]


def _arms(results: Results) -> Iterator[str]:
    lines = []
    for name in dict.fromkeys(it.variant.arm for it in results.models):
        own = ", ".join(f"`{line}`" for line in ARMS[name].overrides)
        tuned = ", ".join(f"`{line}`" for line in results.config.overrides.get(name, ()))
        extra = f" Only here: {tuned}." if tuned else ""
        lines.append(f"* `{name}`: {ARMS[name].meaning}.{f' {own}.' if own else ''}{extra}")
    yield "\n".join(lines)
    schedule = results.config.schedule
    yield (
        f"The same for every arm, but for what is named above: learning rate "
        f"{schedule.learning_rate or 1e-3:g} ({schedule.kind}), weights, optimizer, batch, data."
    )


def _paired(results: Results, variant: Variant, other: Variant) -> str:
    found = results.difference(variant, other) if variant != other else None
    if found is None:
        return ""
    band = f" ({found.low:+.3f} to {found.high:+.3f})" if found.count > 1 else ""
    return f"{found.mean:+.3f}{band}"


def _speedup(results: Results, variant: Variant, reference: Variant) -> str:
    if variant == reference:
        return ""
    speedup = results.speedup(variant, reference)
    return show_steps(speedup).replace(" times fewer", "") if speedup else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---:") -> str:
    lines = [head, ["---"] + [align] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
