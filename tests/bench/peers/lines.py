"""How a peer's script talks with the bench: see child.py. Standard library only."""

import json
import sys
from collections.abc import Callable
from typing import Any


def answer_lines(about: dict[str, Any], act: Callable[..., dict[str, Any]]) -> None:
    """Say that the peer is ready, then act on each line."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(json.dumps(act(**json.loads(line))), flush=True)
