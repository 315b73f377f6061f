"""Checkpoints behind URIs: the newest of a run is chosen where it lies, and only it is fetched."""

import re
from pathlib import Path

from gptmoe.config import Uri
from gptmoe.errors import CheckpointError
from gptmoe.remote import fetch, look

from .folders import STEP
from .manifest import MANIFEST

_MANIFEST = re.compile(rf"((?:checkpoints/)?{STEP.pattern})/{re.escape(MANIFEST)}")


def latest_uri(uri: Uri) -> Uri:
    """The newest complete checkpoint of a run's or a checkpoints folder, or `uri` if it is one.

    Raises CheckpointError if there is none, DataError if nothing is there or can be reached.
    """
    names = look(uri).files
    if MANIFEST in names:
        return uri
    matches = [match for name in names if (match := _MANIFEST.fullmatch(name))]
    if not matches:
        raise CheckpointError(
            f"{uri} holds no complete checkpoint; name a checkpoint, a run's folder or its "
            "checkpoints folder"
        )
    newest = max(matches, key=lambda match: int(match[2]))[1]
    address, mark, options = uri.partition("?")
    return Uri(f"{address.rstrip('/')}/{newest}{mark}{options}")


def fetch_checkpoint(uri: Uri, folder: Path) -> Path:
    """Copy the newest checkpoint at `uri` below `folder`, once and whole; returns its path there.

    Raises as `latest_uri` does, and DataError if the copy fails.
    """
    return fetch(latest_uri(uri), folder)
