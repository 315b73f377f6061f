"""A study from its corpus to its page: what is done is left alone, what is not goes on."""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gptmoe import config as configs
from gptmoe.errors import ClusterError
from train.state import StateFile, replace_json

from . import corpus
from .config import StudyConfig
from .estimate import seconds
from .launch import Launcher, Outcome, carry_out, last_step
from .order import Order, is_done
from .plan import Sized, arm_runs, sized, speed_runs, table
from .publish import PAGE, draw, publish
from .results import collect

log = logging.getLogger(__name__)

PROGRESS = "progress.json"
_SAY_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study whose corpus is prepared."""

    config: StudyConfig
    models: tuple[Sized, ...]
    vocab_size: int
    state: StateFile
    command: str
    draw: Callable[[Path], None] = draw
    """Draws the curves of a study's folder."""

    @classmethod
    def prepare(cls, config: StudyConfig, state: StateFile, command: str) -> Self:
        """Check all sizes, then make what all arms read."""
        sized(config, config.data.vocab_size)  # what cannot be is refused before minutes of work
        vocab_size = corpus.prepare(config, state.preparing)
        replace_json(config.study.dir / "config.json", configs.to_dict(config))
        models = sized(config, vocab_size)
        return cls(
            config=config, models=models, vocab_size=vocab_size, state=state, command=command
        )

    def run(self, launcher: Launcher, until_s: float) -> bool:
        """Run what is left and write the page; whether all is done.

        Raises ClusterError if a run failed, when all others are through.
        """
        training, speed = self.orders(until_s)
        progress = Progress(training)
        self.state.write(state="running", message="", max_steps=progress.max_steps)
        log.info("%d of %d runs are left", len(_left(training)), len(training))
        study = self.config.study
        outcome = carry_out(_left(training), launcher, study.parallel, until_s, progress.watch)
        progress.write([])
        if not outcome.paused and not outcome.failures:
            measured = carry_out(_left(speed), launcher, 1, until_s)
            outcome = Outcome(measured.paused, measured.failures)
        self.publish()
        if outcome.failures:
            raise ClusterError(_told(outcome))
        if outcome.paused:
            log.info("paused; the same command goes on")
        return not outcome.paused

    def orders(self, until_s: float) -> tuple[list[Order], list[Order]]:
        """All runs of the arms, and all measurements of speed."""
        study = self.config.study
        training = [
            Order(
                kind="train",
                config=run.config,
                threads=study.threads,
                final_samples=study.final_samples,
                until_s=until_s,
            )
            for run in arm_runs(self.config, self.models)
        ]
        speed = [
            Order(
                kind="speed",
                config=dataclasses.replace(
                    run.config, run=dataclasses.replace(run.config.run, dir=run.folder)
                ),
                threads=study.threads,
            )
            for run in speed_runs(self.config, self.models)
        ]
        return training, speed

    def publish(self) -> None:
        """Write the page of what is finished, if anything is."""
        passes = corpus.passes(self.config)
        results = collect(self.config, self.vocab_size, passes)
        if passes > corpus.MANY_PASSES:
            log.warning(
                "each training sample is seen %.0f times: the losses say more about learning by "
                "heart than about routers; give a larger corpus (data.inputs)",
                passes,
            )
        if not results.runs:
            return
        sizes = table(self.config, self.models, seconds(self.config, self.models))
        publish(results, sizes, self.config.study.dir, self.command)
        self.draw(self.config.study.dir)
        log.info("wrote %s", self.config.study.dir / PAGE)


class Progress:
    """progress.json: steps done of all runs, for whoever watches."""

    def __init__(self, orders: Sequence[Order]) -> None:
        self._orders = orders
        self._due_at_s = 0.0
        self.max_steps = sum(order.config.train.max_steps or 0 for order in orders)

    def watch(self, running: Sequence[Order]) -> None:
        """Write it every second."""
        if time.monotonic() >= self._due_at_s:
            self._due_at_s = time.monotonic() + _SAY_EVERY_S
            self.write(running)

    def write(self, running: Sequence[Order]) -> None:
        """Write it now."""
        steps = sum(last_step(order.folder / "metrics.jsonl") for order in self._orders)
        folder = self._orders[0].folder.parents[1]
        names = [order.folder.name for order in running]
        plain = {"steps": steps, "max_steps": self.max_steps, "running": names}
        replace_json(folder / PROGRESS, plain)


def _left(orders: Sequence[Order]) -> list[Order]:
    return [order for order in orders if not is_done(order)]


def _told(outcome: Outcome) -> str:
    reasons = "; ".join(f"{it.order.folder.name}: {it.reason}" for it in outcome.failures)
    return (
        f"{len(outcome.failures)} runs of the study failed ({reasons}); the page holds the others, "
        "and the same command tries these again"
    )
