"""Names and order of checkpoint folders: RUN/checkpoints/step-00000020, `.tmp` if not complete."""

import logging
import re
import shutil
from pathlib import Path

from gptmoe.errors import CheckpointError

from .manifest import ADVICE, MANIFEST

logger = logging.getLogger(__name__)

UNFINISHED = ".tmp"
STEP = re.compile(r"step-(\d+)")


def checkpoint_name(step: int) -> str:
    """The folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def unfinished(folder: Path) -> Path:
    """Where `folder` is while it is being written or removed; nobody takes it for a checkpoint."""
    return folder.with_name(folder.name + UNFINISHED)


def steps(checkpoints_dir: Path) -> list[Path]:
    """The committed checkpoints in a folder, oldest first; none if there is no such folder."""
    if not checkpoints_dir.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in checkpoints_dir.iterdir()
        if (match := STEP.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def latest(path: Path | str) -> Path:
    """The newest complete checkpoint of a run's or a checkpoints folder, or `path` if it is one.

    Raises CheckpointError if there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder; name a checkpoint, a run's folder or its checkpoints folder"
        )
    if STEP.fullmatch(path.name):
        raise CheckpointError(
            f"{path} is not a complete checkpoint: it has no {MANIFEST}; {ADVICE}"
        )
    checkpoints_dir = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for folder in reversed(steps(checkpoints_dir)):
        if (folder / MANIFEST).is_file():
            return folder
        logger.warning(
            "%s is not a complete checkpoint: it has no %s; an older one is used", folder, MANIFEST
        )
    raise CheckpointError(
        f"{checkpoints_dir} holds no complete checkpoint; "
        f"let the run reach its first save or name another folder"
    )


def prune(checkpoints_dir: Path, keep: int, written: Path | None = None) -> None:
    """Remove all but the newest `keep` checkpoints, and what a crash left half written or removed.

    With `written`, the one that was just saved, later ones go, too, and count for nothing: a run
    that saves before them has passed them over as damaged, and its numbers go on without them.
    Call it while nothing is being saved there. What cannot be removed is logged and stays.
    """
    assert keep >= 1
    leftovers = list(checkpoints_dir.glob(f"step-*{UNFINISHED}"))
    complete = [folder for folder in steps(checkpoints_dir) if (folder / MANIFEST).is_file()]
    count = complete.index(written) + 1 if written in complete else len(complete)
    try:
        for leftover in leftovers:
            shutil.rmtree(leftover)
        for folder in [*complete[count:], *complete[: max(0, count - keep)]]:
            shutil.rmtree(
                folder.rename(unfinished(folder))
            )  # a crash in here must not leave half a checkpoint
    except OSError as error:
        logger.warning("an old checkpoint in %s could not be removed: %s", checkpoints_dir, error)
