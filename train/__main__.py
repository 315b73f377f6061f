"""python -m train pretrain|finetune CONFIG [key=value ...]: prepare, start or join Ray, train.

People call `gptmoe pretrain ...`, which runs this as a child or a Ray job and draws its progress.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from cluster import env

env.prepare()  # before anything imports ray or deepspeed

from cluster.child import end_with_parent  # noqa: E402
from gptmoe import config as configs  # noqa: E402
from gptmoe.errors import GptMoeError  # noqa: E402
from gptmoe.metrics import cut_after  # noqa: E402

from .config import TrainConfig  # noqa: E402
from .launch import launch  # noqa: E402
from .plan import Kind, make_plan  # noqa: E402
from .state import GO_ON, StateFile, claimed, replace_json  # noqa: E402

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and return the exit code: 0, 2 for an error with a message, 130 when interrupted."""
    options = _parse(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s | %(message)s"
    )
    _listen()
    end_with_parent()
    try:
        config = configs.load(TrainConfig, options.config, options.overrides)
        with claimed(config.run.dir) as state:
            train(options.kind, config, state, options.address)
    except GptMoeError as error:
        sys.stderr.write(f"failed: {error}\n")
        return 2
    except (KeyboardInterrupt, SystemExit):  # the latter while Ray starts: its answer to SIGTERM
        sys.stderr.write(f"interrupted: {GO_ON}\n")
        return 130
    return 0


def train(kind: Kind, config: TrainConfig, state: StateFile, address: str | None = None) -> None:
    """Plan, and train what the plan leaves to do."""
    plan = make_plan(kind, config, state.preparing)
    replace_json(plan.run_dir / "config.json", plan.stored_config())
    state.write(message="", max_steps=plan.max_steps)
    log.info("%s", plan.in_words())
    if plan.done < plan.max_steps:
        launch(plan, state, address)
    else:
        cut_after(plan.run_dir / "metrics.jsonl", plan.done)


def _listen() -> None:
    """Let signals interrupt; the end of a terminal only without `nohup`, which has it ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _interrupt)


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
