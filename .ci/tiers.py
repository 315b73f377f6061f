"""Run tiers of tests in order: python .ci/tiers.py static unit ranks ray faults

Each tier is its own process, so that none inherits another's threads, processes or imports. A tier
without tests passes. All tiers run even if one fails; the last line sums them up as pytest does.

Tests on Ray wait for half of their time, so the tier that only computes runs beside the others, at
a lower priority: it takes the time that they leave. What it says is printed when it has ended.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
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
BESIDE = ("ranks",)
"""Tiers that run beside others: no test of theirs measures time, and their limits are minutes."""
NICENESS = 5
"""Of those. Far from the lowest priority: they wait for each other, and at 19 a machine that others
kept busy for five minutes left them too little to end a test within its limit."""
ALONE = ("gpu", "bench")
"""Tiers that want the machine for themselves, and torch's threads as they are."""
SHARING = {"OMP_WAIT_POLICY": "passive"}
"""Threads that wait sleep. By default they spin, and steal the core of the one they wait for as
soon as anything else runs: a test with two threads took 99 s instead of 5."""


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
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = pytest_command(tier, report)
        outcomes = Counter[str]()
        if command:
            outcomes = count(report, subprocess.call(command, cwd=ROOT, env=environment(tier)))
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


def pytest_command(tier: str, report: Path) -> list[str | Path]:
    """What runs the tests of a tier; empty if there are none."""
    paths = [path for name in TESTS[tier] for path in sorted((ROOT / "tests").glob(name))]
    return [sys.executable, "-m", "pytest", f"--junit-xml={report}", *paths] if paths else []


def environment(tier: str) -> Mapping[str, str]:
    return os.environ if tier in ALONE else {**SHARING, **os.environ}


@dataclass
class Beside:
    """Tiers that run in the time that others leave, one after another."""

    tiers: list[str]
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _is_over: bool = field(default=False, init=False)

    @contextlib.contextmanager
    def running(self) -> Iterator[list[Future[tuple[Result, str]]]]:
        """Results with what was said, to come. If the block breaks off, so do they."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            try:
                yield [pool.submit(self._run, tier) for tier in self.tiers]
            except BaseException:
                self._is_over = True
                if self._process:
                    self._process.send_signal(signal.SIGINT)
                raise

    def _run(self, tier: str) -> tuple[Result, str]:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as said:
            report = Path(scratch) / "report.xml"
            outcomes = Counter[str]()
            command = [] if self._is_over else pytest_command(tier, report)
            if command:
                self._process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment(tier),
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                give_way(self._process.pid)
                outcomes = count(report, self._process.wait())
            said.seek(0)
            return Result(tier, outcomes, time.monotonic() - started), said.read()


def give_way(leader: int) -> None:
    """Let all other processes go before those of a session, mostly.

    Linux may share its time among sessions first, whose own priority is that of their group.
    """
    os.setpriority(os.PRIO_PROCESS, leader, NICENESS)
    with contextlib.suppress(OSError):
        Path(f"/proc/{leader}/autogroup").write_text(str(NICENESS))


def count(report: Path, status: int) -> Counter[str]:
    """Outcomes by pytest's report and exit status."""
    if status == NO_TESTS:
        return Counter()
    outcomes = read(report) if report.exists() else Counter()
    if status and not outcomes["failed"] and not outcomes["errors"]:
        outcomes["errors"] += 1  # it broke off
    return outcomes


def read(report: Path) -> Counter[str]:
    found = next(ET.parse(report).iter("testsuite")).attrib
    total = int(found["tests"])
    bad = {"failed": "failures", "errors": "errors", "skipped": "skipped"}
    outcomes = Counter({ours: int(found[theirs]) for ours, theirs in bad.items()})
    outcomes["passed"] = total - outcomes.total()
    return outcomes


def run_all(tiers: list[str]) -> list[Result]:
    """Results in the order in which the tiers ended."""
    beside = Beside([tier for tier in tiers if tier in BESIDE] if len(tiers) > 1 else [])
    others = [tier for tier in tiers if tier not in beside.tiers]
    results = []
    with beside.running() as running:

        def collect(*, wait: bool) -> None:
            while running and (wait or running[0].done()):
                result, said = running.pop(0).result()
                print(f"\n== {result.tier}\n{said}== {result}", flush=True)
                results.append(result)

        for tier in others:
            collect(wait=tier in ALONE)
            print(f"\n== {tier}", flush=True)
            results.append(run_tier(tier))
            print(f"== {results[-1]}", flush=True)
        collect(wait=True)
    return results


def main(tiers: list[str]) -> int:
    unknown = [tier for tier in tiers if tier not in TESTS]
    if unknown or not tiers:
        print(f"unknown tier {' '.join(unknown)}; choose from {' '.join(TESTS)}", file=sys.stderr)
        return 2
    started = time.monotonic()
    results = run_all(tiers)
    if len(results) > 1:
        print("", *results, sep="\n")
        total = sum((result.outcomes for result in results), Counter())
        seconds = time.monotonic() - started
        print(f"{f' {in_words(total)} in {seconds:.2f}s ':=^80}", flush=True)
    return 0 if all(result.ok for result in results) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
