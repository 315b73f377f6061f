"""Time two things in turns, so that a machine's moods hit both: the ratio is the result.

comparison = compare("training step", ours=step, peer=other_step, goal=1.2)
print(table([comparison]))
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

Act = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Seconds of both, round by round."""

    title: str
    ours: str
    peer: str
    goal: float | None
    ours_s: list[float]
    peer_s: list[float]

    @property
    def ratios(self) -> list[float]:
        """How many times faster than the peer, by round."""
        return [peer / ours for ours, peer in zip(self.ours_s, self.peer_s, strict=True)]

    @property
    def ratio(self) -> float:
        """The median round's."""
        return statistics.median(self.ratios)

    @property
    def reached(self) -> bool:
        """Whether the ratio is at least the goal, if there is one."""
        return self.goal is None or self.ratio >= self.goal


def compare(
    title: str,
    ours: tuple[str, Act],
    peer: tuple[str, Act],
    *,
    goal: float | None = None,
    rounds: int = 9,
    warmups: int = 2,
    after_each: Act = lambda: None,
) -> Comparison:
    """Run both `rounds` times in turns; who begins changes with the round.

    `after_each` is called after every run and not timed.
    """
    (our_name, our_act), (peer_name, peer_act) = ours, peer
    for act in (our_act, peer_act) * warmups:
        act()
        after_each()
    ours_s: list[float] = []
    peer_s: list[float] = []
    for number in range(rounds):
        turns = [(our_act, ours_s), (peer_act, peer_s)]
        for act, seconds in turns[:: 1 if number % 2 else -1]:
            seconds.append(seconds_of(act))
            after_each()
    return Comparison(
        title=title, ours=our_name, peer=peer_name, goal=goal, ours_s=ours_s, peer_s=peer_s
    )


def seconds_of(act: Act) -> float:
    """How long it takes."""
    began_s = time.perf_counter()
    act()
    return time.perf_counter() - began_s


def table(comparisons: Sequence[Comparison], work: float = 0.0, unit: str = "") -> str:
    """Medians with the middle half of the rounds, ratios, goals; `work` of a run gives a rate."""
    lines = []
    for c in comparisons:
        verdict = "" if c.goal is None else f"   goal {c.goal:g}: {'yes' if c.reached else 'NO'}"
        lines.append(f"{c.title}: {c.ratio:.2f} times{between(c.ratios, 1, '.2f')}{verdict}")
        for name, seconds in ((c.ours, c.ours_s), (c.peer, c.peer_s)):
            middle = statistics.median(seconds)
            rate = f"{work / middle:10,.0f} {unit}" if work else ""
            spread = between(seconds, 1e3, ".1f")
            lines.append(f"    {name:<40}{middle * 1e3:9.1f} ms{spread}{rate}")
    return "\n".join(lines)


def between(values: Sequence[float], scale: float, form: str) -> str:
    """The middle half of the values, as text."""
    low, _, high = statistics.quantiles(values, n=4)
    return f" ({low * scale:{form}} to {high * scale:{form}})"


def write_json(path: Path, comparisons: Sequence[Comparison]) -> None:
    """All rounds, with ratios and verdicts."""
    facts = [asdict(c) | {"ratio": c.ratio, "reached": c.reached} for c in comparisons]
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
