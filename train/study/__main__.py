"""python -m train.study CONFIG [key=value ...]: a study of routers in plain processes, without Ray.

People call `gptmoe study routers ...`, which runs this as a child and draws its progress.
"""

import argparse
import dataclasses
import json
import logging
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from cluster.child import end_with_parent
from gptmoe import config as configs
from gptmoe.errors import GptMoeError
from gptmoe.text import load_tokenizer
from train.state import GO_ON, claimed

from .config import StudyConfig
from .estimate import seconds
from .launch import Children, Launcher
from .order import PAUSED
from .page import sizes_table
from .plan import sized, table
from .study import Study

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line."""

    config: Path
    overrides: tuple[str, ...]
    address: str
    minutes: float | None
    dry_run: bool
    json: bool

    @property
    def command(self) -> str:
        """What a person would type for the same study."""
        return shlex.join(["gptmoe", "study", "routers", str(self.config), *self.overrides])


def main(words: Sequence[str] | None = None) -> int:
    """Run and return the exit code: 0, 75 if it is to go on later, 2 for an error, 130."""
    return run(parse(words), lambda options: Children())


def run(options: Options, make_launcher: Callable[[Options], Launcher]) -> int:
    """The same with processes of another kind."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s | %(message)s"
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    end_with_parent()
    until_s = time.time() + 60 * options.minutes if options.minutes is not None else 0.0
    try:
        config = configs.load(StudyConfig, options.config, options.overrides)
        if options.dry_run:
            sys.stdout.write(dry_run(config, as_json=options.json) + "\n")
            return 0
        with claimed(config.study.dir, "study.dir") as state:
            config = dataclasses.replace(
                config, study=dataclasses.replace(config.study, dir=config.study.dir.absolute())
            )
            study = Study.prepare(config, state, options.command)
            return 0 if study.run(make_launcher(options), until_s) else PAUSED
    except GptMoeError as error:
        sys.stderr.write(f"failed: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted: {GO_ON}\n")
        return 130


def dry_run(config: StudyConfig, *, as_json: bool = False) -> str:
    """The table of sizes with estimated times, and of the whole study; nothing is written."""
    study = config.study
    vocab_size = config.data.vocab_size
    if config.data.tokenizer is not None:
        vocab_size = load_tokenizer(config.data.tokenizer).vocab_size
    models = sized(config, vocab_size)
    rows = table(config, models, seconds(config, models))
    one_seed_s = sum(row.estimated_s for row in rows)
    total_s = one_seed_s * len(study.seeds) / study.parallel
    tokens = sum(row.tokens for row in rows) * len(study.seeds)
    if as_json:
        plain = {"arms": [asdict(row) for row in rows], "tokens": tokens, "estimated_s": total_s}
        return json.dumps(plain, indent=2)
    return (
        f"{sizes_table(rows)}\n\n{len(rows)} arms x {len(study.seeds)} seeds: {tokens:,} tokens, "
        f"about {total_s / 60:.0f} minutes with {study.parallel} at a time on this machine"
    )


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def parse(words: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m train.study", description=__doc__)
    parser.add_argument("config", type=Path, help="a TOML file, such as configs/study/small.toml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--address", default="", help="only with python -m train.study.jobs")
    parser.add_argument("--minutes", type=float, default=None, help="pause after so many")
    parser.add_argument("--dry-run", action="store_true", help="only print the table of sizes")
    parser.add_argument("--json", action="store_true")
    found = parser.parse_args(words)
    return Options(**vars(found) | {"overrides": tuple(found.overrides)})


if __name__ == "__main__":
    sys.exit(main())
