"""The demo's flow: tokenizer, pretraining, finetuning, Serve, one streamed request, a summary.

Each stage is the command that a user would type, printed before it runs, as a child process.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster import env, follow
from cluster.child import Child
from cluster.client import Client, Sampling
from gptmoe import metrics
from gptmoe.errors import ClusterError

from .plan import CALIBRATION_STEPS, FINETUNE_SHARE, DemoPlan, steps_for, typed
from .summary import Answer, Summary

START_WITHIN_S = 180.0


class DemoRun:
    """Runs a plan and collects what the summary tells."""

    def __init__(self, plan: DemoPlan, console: Console) -> None:
        self.plan = plan
        self.console = console

    def train(self) -> None:
        """Tokenizer, pretraining and finetuning."""
        self._say("1. A tokenizer from the corpus", self.plan.tokenizer_command())
        self._tool(self.plan.tokenizer_command())
        steps, finetune_steps = self._budget()
        words = self.plan.pretrain_command(steps, steps)
        self._say("2. Pretraining on Ray Train: two workers own half of the experts each", words)
        self._train(words, self.plan.pretrain_dir)
        words = self.plan.finetune_command(finetune_steps)
        self._say("3. Finetuning: every line is a poem that ends with <sep>", words)
        self._train(words, self.plan.finetune_dir)

    @contextmanager
    def served(self) -> Iterator[dict[str, Any]]:
        """The finetuned model behind Ray Serve; yields its endpoints."""
        words = self.plan.serve_command()
        self._say("4. Serving it on Ray Serve", words)
        state_file = self.plan.output / "endpoints.json"
        state_file.unlink(missing_ok=True)
        lines: list[str] = []
        child = Child([*words, "--state-file", str(state_file)], on_line=lines.append)
        with child.attached():
            yield await_endpoints(state_file, child, lines)

    def ask(self, target: str, prompt: str, max_new_tokens: int) -> Answer:
        """Stream one answer over gRPC, printing it as it comes."""
        words = ["generate", prompt, "--target", target, "--stream"]
        self._say("5. One request, streamed over gRPC", words)
        self.console.print(f"  {prompt}", end="", style="bold")
        began_s, first_s, text, tokens = time.perf_counter(), 0.0, "", 0
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.7, top_k=5, seed=1)
        with Client(target) as client:
            for chunk in client.stream(prompt, **sampling):
                first_s = first_s or time.perf_counter() - began_s
                text, tokens = text + chunk.text, tokens + len(chunk.token_ids)
                self.console.print(chunk.text, end="", style="bold green")
        self.console.print()
        return Answer(prompt, text, tokens, first_s, time.perf_counter() - began_s)

    def summary(self, answer: Answer, endpoints: dict[str, Any], began_s: float) -> Summary:
        """What the run folders and the request say."""
        return Summary.collect(self.plan, answer, endpoints, time.monotonic() - began_s)

    def _budget(self) -> tuple[int | None, int | None]:
        """Steps of pretraining and finetuning; timed on a few where minutes are given."""
        if self.plan.minutes is None:
            return None, None
        words = self.plan.pretrain_command(CALIBRATION_STEPS)
        self._say(f"   {CALIBRATION_STEPS} steps first: how many fit into the time?", words)
        self._train(words, self.plan.pretrain_dir)
        records = metrics.read(self.plan.pretrain_dir / "metrics.jsonl")
        times_s = [record["step_s"] for record in records if "step_s" in record]
        step_s = statistics.median(times_s[CALIBRATION_STEPS // 2 :])
        pretrain_minutes = self.plan.minutes * (1 - FINETUNE_SHARE)
        finetune_minutes = self.plan.minutes * FINETUNE_SHARE
        return steps_for(pretrain_minutes, step_s), steps_for(finetune_minutes, step_s)

    def _train(self, words: Sequence[str], folder: Path) -> None:
        lines: list[str] = []
        child = Child(["train", *words], on_line=lines.append)
        with child.attached():
            follow.follow(folder, self.console, child.has_ended)
            _check(child.wait(), words, lines)

    def _tool(self, words: Sequence[str]) -> None:
        command = [sys.executable, "-m", "cluster.cli", *words]
        done = subprocess.run(command, env=env.child_environment(starts_cluster=False), check=False)
        _check(done.returncode, words, [])

    def _say(self, title: str, words: Sequence[str]) -> None:
        self.console.print(f"\n{title}", style="bold")
        self.console.print(f"$ {typed(words)}", style="dim")


def await_endpoints(
    state_file: Path,
    child: Child,
    lines: Sequence[str],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Wait for `python -m serve --state-file`; raises ClusterError if it ends or takes too long."""
    deadline_s = clock() + START_WITHIN_S
    while not state_file.exists():
        if child.has_ended():
            _check(child.wait() or 1, ["serve"], lines)
        if clock() > deadline_s:
            raise ClusterError(f"Ray Serve did not come up within {START_WITHIN_S:g} s")
        time.sleep(0.1)
    endpoints: dict[str, Any] = json.loads(state_file.read_text(encoding="utf-8"))
    return endpoints


def _check(code: int, words: Sequence[str], lines: Sequence[str]) -> None:
    if code == 130:
        raise KeyboardInterrupt
    if code:
        last = "\n".join(lines[-20:])
        raise ClusterError(f"the demo stopped at `gptmoe {words[0]}` (exit code {code})\n{last}")
