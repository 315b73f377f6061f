"""python -m train pretrain|finetune CONFIG [key=value ...]: prepare, start or join Ray, train.

People call `gptmoe pretrain ...`, which runs this as a child or a Ray job and draws its progress.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from cluster import env

env.prepare()  # before anything imports ray or deepspeed

from gptmoe import config as configs  # noqa: E402
from gptmoe.errors import GptMoeError  # noqa: E402

from .config import TrainConfig  # noqa: E402
from .launch import launch  # noqa: E402
from .plan import make_plan  # noqa: E402
from .state import State, write_state  # noqa: E402

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and return the exit code: 0, 2 for an error with a message, 130 when interrupted."""
    options = _parse(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s | %(message)s"
    )
    signal.signal(signal.SIGTERM, _interrupt)
    config = None
    state = State(state="preparing", pid=os.getpid())
    try:
        config = configs.load(TrainConfig, options.config, options.overrides)
        write_state(config.run.dir, state)
        plan = make_plan(options.kind, config)
        launch(plan, state, options.address)
    except GptMoeError as error:
        return _end(config, state, "failed", str(error), 2)
    except KeyboardInterrupt:
        return _end(config, state, "interrupted", "start the same command again to go on", 130)
    return _end(config, state, "finished", "", 0)


def _end(config: TrainConfig | None, state: State, name: str, message: str, code: int) -> int:
    if config is not None:
        with contextlib.suppress(OSError):
            write_state(config.run.dir, dataclasses.replace(state, state=name, message=message))  # type: ignore[arg-type]
    if message:
        sys.stderr.write(f"{name}: {message}\n")
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    parser.add_argument("kind", choices=["pretrain", "finetune"])
    parser.add_argument(
        "config", type=Path, help="a TOML file, for example configs/train/tiny.toml"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example parallel.ep=2 run.dir=runs/a"
    )
    parser.add_argument(
        "--address", default=None, help="an existing Ray cluster; default: a local one"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
