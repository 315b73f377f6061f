"""python -m train.study.work FOLDER/order.json: one process of a study.

Exit code 0 if it is done, 75 if it has paused (start it again to go on), 2 for an error with a
message.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import torch

from gptmoe.errors import GptMoeError

from .order import PAUSED, read_order
from .training import Paused, measure, train_arm

log = logging.getLogger(__name__)


class _Signalled:
    """Whether this process was told to end: it does so after the step that it is in."""

    def __init__(self) -> None:
        self.told = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.told = True


def main(words: Sequence[str]) -> int:
    """Carry out the order; returns the exit code."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s | %(message)s"
    )
    signalled, parent = _Signalled(), os.getppid()
    try:
        order = read_order(Path(words[0]))
        torch.set_num_threads(order.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if order.kind == "speed":
            measure(order, device)
        else:
            train_arm(order, device, stopper(order.until_s, signalled, parent))
    except Paused as pause:
        log.info("paused %s", pause)
        return PAUSED
    except GptMoeError as error:
        sys.stderr.write(f"failed: {error}\n")
        return 2
    return 0


def stopper(until_s: float, signalled: "_Signalled", parent: int) -> Callable[[], bool]:
    """Asked after each step: time is up, a signal came, or whoever started this is gone."""
    return lambda: signalled.told or 0 < until_s <= time.time() or os.getppid() != parent


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
