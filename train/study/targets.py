"""What the described system claims of its router, held against a study's intervals. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from .arms import ARMS, CHOICE, REFERENCE, Variant
from .intervals import Interval, Verdict, judge
from .results import Results, Speedup

STEPS_AGAINST_DENSE = 1.3
STEPS_AGAINST_TWICE_DENSE = 1.17
STEPS_AGAINST_S_BASE = 1.48
THRESHOLD_COST = 0.01
"""Nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the table of targets."""

    target: int
    """1 to 4."""
    claim: str
    found: str
    verdict: Verdict


def findings(results: Results) -> list[Finding]:
    """All targets that the finished runs can speak of, in order."""
    found = []
    for experts in results.config.study.experts:
        found += [*_fewer_steps_than_dense(results, experts), *_best_router(results, experts)]
        found += [*_throughput(results, experts), *_thresholds(results, experts)]
    return sorted(found, key=lambda finding: finding.target)


def show(it: Interval, digits: int = 3) -> str:
    """`0.120 (0.080 to 0.160)`; a single value alone."""
    if it.count < 2:
        return f"{it.mean:.{digits}f}"
    return f"{it.mean:.{digits}f} ({it.low:.{digits}f} to {it.high:.{digits}f})"


def show_steps(speedup: Speedup) -> str:
    """`1.40 (1.20 to 1.60) times fewer`; with a bound where seeds fell short of the loss."""
    times = f"{show(speedup.times, 2)} times fewer"
    if speedup.reached == speedup.seeds:
        return times
    return f"at most {times} ({speedup.reached} of {speedup.seeds} seeds came down to it)"


def _fewer_steps_than_dense(results: Results, experts: int) -> Iterator[Finding]:
    for arm in ARMS.values():
        if arm.experts:
            variant = Variant(arm.name, experts)
            yield from _steps(results, 1, variant, Variant(REFERENCE), STEPS_AGAINST_DENSE)
    twice = Variant("dense_2x")
    yield from _steps(results, 1, Variant(CHOICE, experts), twice, STEPS_AGAINST_TWICE_DENSE)


def _best_router(results: Results, experts: int) -> Iterator[Finding]:
    choice = Variant(CHOICE, experts)
    for arm in ("s_base", "switch"):
        yield from _below(results, choice, Variant(arm, experts))
    yield from _steps(results, 2, choice, Variant("s_base", experts), STEPS_AGAINST_S_BASE)


def _steps(
    results: Results, target: int, variant: Variant, reference: Variant, times: float
) -> Iterator[Finding]:
    speedup = results.speedup(variant, reference)
    if speedup is None:
        return
    verdict = judge(speedup.times, times, "at least")
    if speedup.reached < speedup.seeds:
        never = f"{speedup.seeds - speedup.reached} of {speedup.seeds} seeds never came down to it"
        verdict = Verdict(
            "open" if verdict.state == "reached" else verdict.state, f"{verdict.text}; {never}"
        )
    claim = (
        f"{variant.name} comes to the final loss of {reference.name} in 1/{times:g} of the steps"
    )
    yield Finding(target=target, claim=claim, found=show_steps(speedup), verdict=verdict)


def _below(results: Results, one: Variant, other: Variant) -> Iterator[Finding]:
    steps = results.differences_by_step(one, other)
    if not steps:
        return
    worst_step, worst = max(steps, key=lambda pair: pair[1].mean)
    carried = sum(it.high < 0 for _, it in steps)
    if worst.mean >= 0:
        verdict = Verdict("missed", f"missed by {worst.mean:.3g} nats at step {worst_step}")
    elif carried == len(steps):
        verdict = Verdict("reached", "reached")
    else:
        text = f"not carried by the interval at {len(steps) - carried} of {len(steps)} validations"
        verdict = Verdict("open", f"{text}; the mean keeps it at all")
    yield Finding(
        target=2,
        claim=f"{one.name}, causal, is below {other.name} throughout the second half",
        found=f"at its worst validation {show(worst)} nats",
        verdict=verdict,
    )


def _throughput(results: Results, experts: int) -> Iterator[Finding]:
    base = results.speeds.get(f"s_base-{experts}, 8 iterations")
    name = Variant(CHOICE, experts).name
    if not base or name not in results.speeds:
        return
    ratio = median(results.speeds[name]) / median(base)
    yield Finding(
        target=3,
        claim=f"throughput of {name} against s_base-{experts} with 8 iterations (described: 1.17)",
        found=f"{ratio:.2f} times",
        verdict=Verdict("open", "reported: medians of few rounds, no interval"),
    )


def _thresholds(results: Results, experts: int) -> Iterator[Finding]:
    for arm in ARMS:
        cost = results.acausal_cost(Variant(arm, experts))
        if cost is not None:
            yield Finding(
                target=4,
                claim=f"thresholds cost {Variant(arm, experts).name} at most {THRESHOLD_COST} nats "
                "against acausal routing of the same weights",
                found=f"{show(cost, 4)} nats",
                verdict=judge(cost, THRESHOLD_COST, "at most"),
            )


def median(values: tuple[float, ...]) -> float:
    """Of the rounds of a measurement."""
    return sorted(values)[len(values) // 2]
