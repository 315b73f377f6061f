"""Run tiers of tests in order: python .ci/tiers.py static unit ranks ray faults

Each tier is its own process, so that none inherits another's threads, processes or imports. A tier
without tests passes. All tiers run even if one fails; the last line sums them up as pytest does.
"""

import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).resolve().parent.parent
OUTCOMES = ("failed", "passed", "skipped", "errors")
NO_TESTS = 5
"""pytest's exit status when it collected none."""

TESTS = {
    "static": ["test_*.py"],
    "unit": ["gptmoe", "protos", "cluster", "train", "serve"],
    "ranks": ["ranks"],
    "ray": ["ray"],
    "faults": ["faults"],
    "matrix": ["matrix"],
    "gpu": ["gpu"],
    "bench": ["bench"],
}
CHECKS = {"static": ["ruff format --check .", "ruff check .", "lint-imports", "mypy"]}
"""Commands of a tier that are not pytest's."""


@dataclass(frozen=True)
class Result:
    tier: str
    outcomes: Counter[str]
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.outcomes["failed"] and not self.outcomes["errors"]

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAILED"
        return f"{self.tier:<8}{verdict:<8}{self.seconds:7.1f} s   {in_words(self.outcomes)}"


def in_words(outcomes: Counter[str]) -> str:
    return ", ".join(f"{outcomes[o]} {o}" for o in OUTCOMES if outcomes[o]) or "no tests"


def run_tier(tier: str) -> Result:
    started = time.monotonic()
    checks = {check: start(check) for check in CHECKS.get(tier, [])}  # beside the tests
    paths = [path for name in TESTS[tier] for path in sorted((ROOT / "tests").glob(name))]
    outcomes = run_pytest(paths) if paths else Counter()
    for check, process in checks.items():
        said, _ = process.communicate()
        print(f"-- {check}\n{said}", end="", flush=True)
        outcomes["failed" if process.returncode else "passed"] += 1
    return Result(tier, outcomes, time.monotonic() - started)


def start(check: str) -> subprocess.Popen[str]:
    """A check in a process of its own; what it says is kept until it is asked for."""
    program, *arguments = check.split()
    beside_python = Path(sys.executable).with_name(program)
    return subprocess.Popen(
        [beside_python, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_pytest(paths: list[Path]) -> Counter[str]:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junit-xml={report}", *paths]
        status = subprocess.call(command, cwd=ROOT)
        if status == NO_TESTS:
            return Counter()
        outcomes = count(report) if report.exists() else Counter()
    if status and not outcomes["failed"] and not outcomes["errors"]:
        outcomes["errors"] += 1  # it broke off
    return outcomes


def count(report: Path) -> Counter[str]:
    found = next(ET.parse(report).iter("testsuite")).attrib
    total = int(found["tests"])
    bad = {"failed": "failures", "errors": "errors", "skipped": "skipped"}
    outcomes = Counter({ours: int(found[theirs]) for ours, theirs in bad.items()})
    outcomes["passed"] = total - outcomes.total()
    return outcomes


def main(tiers: list[str]) -> int:
    unknown = [tier for tier in tiers if tier not in TESTS]
    if unknown or not tiers:
        print(f"unknown tier {' '.join(unknown)}; choose from {' '.join(TESTS)}", file=sys.stderr)
        return 2
    results = []
    for tier in tiers:
        print(f"\n== {tier}", flush=True)
        results.append(run_tier(tier))
        print(f"== {results[-1]}", flush=True)
    if len(results) > 1:
        print("", *results, sep="\n")
        total = sum((result.outcomes for result in results), Counter())
        seconds = sum(result.seconds for result in results)
        print(f"{f' {in_words(total)} in {seconds:.2f}s ':=^80}", flush=True)
    return 0 if all(result.ok for result in results) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
