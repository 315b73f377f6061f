"""A deployment that follows a run: after each validation that improves it gets the new weights.

    gptmoe finetune my.toml run.refresh=127.0.0.1:9000

The improved weights are saved at once. What is served is kept under run.dir/served, by hard links,
so that pruning the run's checkpoints does not take it away from shards that start later. A refresh
that failed, or was cut off with the run, is made up for at the next checkpoint, whichever it is;
behind a run's last one there is none, and a person has to.
"""

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from cluster.client import Client, GenerationError
from gptmoe import metrics
from gptmoe.checkpoint import checkpoint_name
from gptmoe.checkpoint.manifest import MANIFEST

log = logging.getLogger(__name__)

SERVED = "served"
CURRENT = "current"
"""A file under served/ that names what the deployment took last."""
WITHIN_S = 300.0


class Refresher:
    """Of one rank. `improves` gives all ranks the same answer; rank 0 alone makes calls."""

    def __init__(
        self,
        run_dir: Path,
        best: float,
        refresh: Callable[[Path], None] | None,
        warn: Callable[[str], None] = log.warning,
        owed: Path | None = None,
    ) -> None:
        """`best` is the lowest validation loss so far. `refresh` moves the deployment; None on the
        other ranks. A deployment that cannot move is a warning: training goes on. `owed` is what it
        lacks from the start."""
        self._served = run_dir / SERVED
        self._best = best
        self._refresh = refresh
        self._warn = warn
        self._due: str = ""
        self._owed = owed

    def improves(self, loss: float, name: str) -> bool:
        """Whether a validation was the best so far: then checkpoint `name` is to be saved now."""
        if not loss < self._best:
            return False
        self._best, self._due = loss, name
        return True

    def saved(self, folder: Path) -> None:
        """A checkpoint is complete; called by the thread that writes them."""
        if folder.name == self._due:
            self._owed = folder
        if self._refresh is None or self._owed is None or not self._owed.exists():
            return
        try:
            self._owed = kept(self._owed, self._served)
            complete = self._told(self._owed)
            (self._served / CURRENT).write_text(self._owed.name, encoding="utf-8")
        except (GenerationError, OSError) as error:
            self._warn(f"TRAINING GOES ON, THE DEPLOYMENT KEEPS ITS WEIGHTS: {error}")
            return
        if complete:  # else replicas may still read those from before
            forget_others(self._served, self._owed.name)
        self._owed = None

    def _told(self, folder: Path) -> bool:
        """Move the deployment; False if it is still on its way."""
        assert self._refresh is not None
        try:
            self._refresh(folder)
        except GenerationError as error:
            if error.code != "DEADLINE_EXCEEDED":
                raise
            self._warn(f"the deployment takes {folder.name} slowly: {error}")
            return False
        return True


def refresher(
    target: str, run_dir: Path, done: int, rank: int, warn: Callable[[str], None]
) -> Refresher:
    """Of a run that has done so many steps; only rank 0 speaks to the deployment."""

    def refresh(folder: Path) -> None:
        with Client(target, timeout_s=WITHIN_S) as client:
            version = client.refresh(str(folder.resolve()), within_s=WITHIN_S)
        log.info("deployment refreshed target=%s version=%s folder=%s", target, version, folder)

    loss, step = best_validation(run_dir, done)
    call = None if rank else refresh
    return Refresher(run_dir, loss, call, warn, owed(run_dir, checkpoint_name(step)))


def best_validation(run_dir: Path, done: int) -> tuple[float, int]:
    """The lowest validation loss recorded up to step `done`, and its step; infinite without any."""
    records = metrics.read(run_dir / "metrics.jsonl") if done else []
    losses = [(r["val_loss"], r["step"]) for r in records if "val_loss" in r and r["step"] <= done]
    return min(losses, default=(math.inf, 0))


def owed(run_dir: Path, name: str) -> Path | None:
    """Checkpoint `name`, the best, if it is there and the deployment has not taken it or a later.

    A later one is from steps that were lost, and better than that: the deployment keeps it.
    """
    current = run_dir / SERVED / CURRENT
    if current.is_file() and current.read_text(encoding="utf-8") >= name:
        return None
    folders = (run_dir / "checkpoints" / name, run_dir / SERVED / name)
    return next((folder for folder in folders if (folder / MANIFEST).is_file()), None)


def kept(folder: Path, served: Path) -> Path:
    """The same checkpoint beneath `served`, sharing its files.

    A run that was taken back makes a step anew, and other weights by the same name are served
    already: these stay, since shards may still start from them, and the new ones get another name.
    """
    target = served / folder.name
    manifest = (folder / MANIFEST).read_bytes()
    if target.exists() and (target / MANIFEST).read_bytes() != manifest:
        target = served / f"{folder.name}-{hashlib.sha256(manifest).hexdigest()[:6]}"
    if not target.exists():
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(folder, part, copy_function=_link)
        part.rename(target)
    return target


def forget_others(served: Path, name: str) -> None:
    """Only what is served now stays."""
    for folder in served.iterdir():
        if folder.name not in (name, CURRENT):
            shutil.rmtree(folder, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
