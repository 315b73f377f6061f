"""topology.json in a run's folder: who owns what, readable without asking Ray."""

import json
import logging
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gptmoe.config import build
from gptmoe.errors import ClusterError, GptMoeError

from .messages import Topology

log = logging.getLogger(__name__)

NAME = "topology.json"


def write(folder: Path, topology: Topology) -> None:
    """Replace the file in `folder`; readers see the old one or the new one, never a part.

    A folder that cannot be written is a warning: it must not stop the run that is being watched.
    """
    raw = {**asdict(topology), "written_at_s": time.time()}
    text = json.dumps(raw, ensure_ascii=False, indent=1)
    temporary = folder / f".{NAME}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(folder / NAME)
    except OSError as error:
        log.warning("topology not written folder=%s error=%s", folder, error)


def read(folder: Path) -> Topology | None:
    """The topology last written, heartbeat ages counted up to now; None if there is no file.

    Raises ClusterError for a file that is not a topology.
    """
    path = folder / NAME
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        age_s = max(0.0, time.time() - raw.pop("written_at_s"))
        topology = build(Topology, raw)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, GptMoeError) as error:
        raise ClusterError(
            f"{path} is not a topology ({error}); remove it, the run will write it again"
        ) from None
    owners = [
        replace(owner, heartbeat_age_s=owner.heartbeat_age_s + age_s) for owner in topology.owners
    ]
    return replace(topology, owners=tuple(owners))
