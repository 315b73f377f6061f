"""The names of metrics: those that Ray's own dashboard asks for, and those of our panels."""

import json
import re
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path

from ray.dashboard.modules.metrics.dashboards.serve_llm_dashboard_panels import (
    serve_llm_dashboard_config,
)

from serve.catalogue import CATALOGUE, COMMON_LABELS, EXPORTED, NOT_APPLICABLE, steps


def panels() -> Iterable[tuple[str, str]]:
    """Title and expression of every target of Ray's "Serve LLM" dashboard."""
    for row in serve_llm_dashboard_config.rows:
        for panel in row.panels:
            for target in panel.targets:
                yield panel.title, target.expr


def asked(expression: str) -> set[str]:
    return set(re.findall(r"\bray_vllm_\w+", expression))


def test_rays_dashboard_finds_what_it_asks_for() -> None:
    """Every vLLM metric in its panels is one of ours, or in the table of those that cannot be."""
    names = set(chain.from_iterable(asked(expression) for _, expression in panels()))
    assert len(names) > 40, "the dashboard has other panels now: look at it again"
    missing = {name for name in names if name not in EXPORTED}
    known = tuple(NOT_APPLICABLE)
    assert {name for name in missing if not name.startswith(known)} == set()
    needless = [name for name in known if not any(found.startswith(name) for found in missing)]
    assert needless == []


def test_a_panel_stays_empty_only_where_the_table_says_so() -> None:
    titles = {title for title, expression in panels() if asked(expression) - EXPORTED}
    filled = {title for title, _ in panels()} - titles
    assert titles == {title for title in titles if title.startswith(("NIXL", "KV Offload"))} | {
        "Scheduler: Swapped"
    }
    assert len(filled) >= 35


def test_rays_dashboard_groups_by_labels_that_are_there() -> None:
    rays_own = {"WorkerId", "deployment", "replica", "le"}  # of Ray, of Ray Serve, of histograms
    for title, expression in panels():
        names = asked(expression) & EXPORTED
        labels = set(COMMON_LABELS) | rays_own
        for metric in CATALOGUE.values():
            if names & set(metric.exported):
                labels |= set(metric.labels)
        grouped = re.findall(r"\b(?:by|on|group_left)\s*\(([^()]*)\)", expression)
        wanted = {label.strip() for group in grouped for label in group.split(",")}
        assert wanted <= labels, title


def test_names_can_be_exported() -> None:
    """Ray drops names with a colon without an error, and puts `_total` behind counters."""
    for name, metric in CATALOGUE.items():
        assert re.fullmatch(r"(vllm|gptmoe)_[a-z0-9_]+", name)
        assert not (metric.kind == "counter" and name.endswith("_total"))
        assert metric.meaning
        assert bool(metric.buckets) == (metric.kind == "histogram")


def test_buckets_are_fine() -> None:
    for metric in CATALOGUE.values():
        assert all(b > a for a, b in pairwise(metric.buckets))
    for name in ("vllm_time_to_first_token_seconds", "vllm_inter_token_latency_seconds"):
        buckets = CATALOGUE[name].buckets
        assert all(b <= 1.3 * a for a, b in pairwise(buckets))
        assert buckets[0] <= 0.001
        assert buckets[-1] >= 10.0
    assert steps(0.1, 1, fine=False) == (0.1, 0.16, 0.25, 0.4, 0.63, 1.0)


# --- our own dashboard -----------------------------------------------------------------------

DASHBOARD = json.loads(
    (Path(__file__).parents[2] / "configs" / "grafana" / "gptmoe.json").read_text(encoding="utf-8")
)
SHOWN = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in SHOWN for target in panel["targets"]]
QUERIES = [one["definition"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]


def test_our_dashboard_draws_only_what_there_is() -> None:
    asked_for = set(chain.from_iterable(re.findall(r"\bray_\w+", e) for e in EXPRESSIONS + QUERIES))
    assert asked_for <= EXPORTED
    ours = {name for name in EXPORTED if name.startswith("ray_gptmoe_")}
    leaves_out = {"ray_gptmoe_step_seconds_sum", "ray_gptmoe_step_seconds_count"}
    assert ours - asked_for == leaves_out, "a metric of ours that nobody sees"


def test_its_labels_and_variables_exist() -> None:
    known = {"WorkerId", "le", *COMMON_LABELS}
    known |= set(chain.from_iterable(metric.labels for metric in CATALOGUE.values()))
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    for expression in EXPRESSIONS:
        grouped = re.findall(r"\b(?:by|on)\s*\(([^()]*)\)", expression)
        filtered = re.findall(r"(\w+)=~", expression)
        assert {name.strip() for group in grouped for name in group.split(",")} <= known
        assert set(filtered) <= known
        assert set(re.findall(r"\$(\w+)", expression)) <= variables
        for brackets in ("()", "{}", "[]"):
            assert expression.count(brackets[0]) == expression.count(brackets[1])


def test_its_panels_have_places_of_their_own() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
    experts = [panel["title"] for panel in SHOWN if "expert" in str(panel["targets"])]
    assert len(experts) == 4
