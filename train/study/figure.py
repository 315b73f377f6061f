"""python -m train.study.figure STUDY_DIR: the curves of a study as a PNG, from its curves.json.

A process of its own: a machine that trains needs no matplotlib.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.ticker
from matplotlib.axes import Axes

from .figure_files import CURVES, FIGURE

_COLOURS = {
    "dense": "#000000", "dense_2x": "#7f7f7f", "switch": "#1f77b4", "top2": "#17becf",
    "s_base": "#2ca02c", "expert_choice": "#d62728", "expert_choice_bare": "#ff7f0e",
    "loss_free": "#9467bd",
}  # fmt: skip
"""An arm looks alike in every figure."""
_STYLES = ("-", "--", ":")


def draw(curves: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Four panels: validation loss by steps and by FLOPs, training loss, load of experts."""
    figure = matplotlib.figure.Figure(figsize=(12, 8.5), layout="constrained")
    (by_steps, by_flops), (training, load) = figure.subplots(2, 2)
    seen: dict[str, int] = {}
    for curve in curves:
        colour = _COLOURS[curve["arm"]]
        style = _STYLES[seen.setdefault(curve["arm"], 0) % len(_STYLES)]
        seen[curve["arm"]] += 1
        look = {"color": colour, "linestyle": style, "label": curve["name"], "linewidth": 1.3}
        _line(by_steps, curve["validation"], look)
        _line(by_flops, [(s * curve["flops"], *rest) for s, *rest in curve["validation"]], look)
        _line(training, curve["training"], look)
        if curve["load"]:
            _line(load, curve["load"], look)
    _name(by_steps, "validation, causal routing", "step", "loss (nats a token)")
    _name(by_flops, "validation, causal routing", "training FLOPs, all parts", "")
    by_flops.set_xscale("log")
    # Labels between the powers of ten overlap.
    by_flops.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    _name(training, "training (expert choice: acausal at first)", "step", "loss (nats a token)")
    _name(load, "busiest expert over the mean, training", "step", "")
    by_steps.legend(fontsize="small")
    for axes in (by_steps, by_flops, training):
        _zoom(axes)
    figure.savefig(path, dpi=110)


def _line(axes: Axes, points: Sequence[Sequence[float]], look: Mapping[str, Any]) -> None:
    """(x, mean) or (x, mean, lowest, highest): the band is what the seeds span."""
    if not points:
        return
    x, mean = [point[0] for point in points], [point[1] for point in points]
    axes.plot(x, mean, **look)
    if len(points[0]) == 4:
        low, high = [point[2] for point in points], [point[3] for point in points]
        axes.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)


def _name(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)


def _zoom(axes: Axes) -> None:
    """Leave out the fall of the first steps, beside which arms look alike."""
    lines = [line.get_ydata() for line in axes.get_lines()]
    late = [float(y) for line in lines for y in list(line)[len(line) // 5 :]]  # type: ignore[arg-type]
    if late and max(late) > min(late):
        margin = 0.05 * (max(late) - min(late))
        axes.set_ylim(min(late) - margin, max(late) + margin)


def main(words: Sequence[str]) -> int:
    """Draw; returns the exit code."""
    folder = Path(words[0])
    plain = json.loads((folder / CURVES).read_text(encoding="utf-8"))
    draw(plain["curves"], folder / FIGURE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
