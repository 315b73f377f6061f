"""A config of `train` or `serve`, checked and resolved, without importing those packages here.

    python -m cluster.resolve pretrain configs/train/tiny.toml parallel.ep=2

prints the resolved config and the number of workers it asks for as JSON, or one sentence and exit
code 2. `resolve` runs that as a child: this folder must not depend on `train` and `serve`, and a
command wants to refuse a wrong config before it starts a cluster or sends a job to one.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptmoe.config import load, to_dict
from gptmoe.errors import ConfigError, GptMoeError

from . import env

_CONFIGS = {
    "pretrain": ("train.config", "TrainConfig"),
    "finetune": ("train.config", "TrainConfig"),
    "serve": ("serve.config", "ServeConfig"),
    "study": ("train.study.config", "StudyConfig"),
}

_WANT_FILE = ("pretrain", "finetune")
"""`python -m train` does not start without one, even if overrides give every key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A config as plain data, paths as they were given or relative to the current folder."""

    kind: str
    config: dict[str, Any]
    workers: int


def resolve(kind: str, config: Path | None, overrides: Sequence[str]) -> Resolved:
    """Load a config in a child process; raises ConfigError with the child's sentence."""
    if config is None and kind in _WANT_FILE:
        raise ConfigError(f"{kind} wants a config file, such as configs/train/tiny.toml; name one")
    files = [str(config)] if config else []
    done = subprocess.run(
        [sys.executable, "-m", "cluster.resolve", kind, *files, *overrides],
        env=env.child_environment(starts_cluster=False),
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return Resolved(**json.loads(done.stdout))
    if done.returncode == 2:
        raise ConfigError(done.stderr.strip())
    raise RuntimeError(f"the config could not be checked:\n{done.stderr}")


def split_words(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """[CONFIG] key=value ... as they stand on a command line: the file and the overrides."""
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"found {len(files)} config files ({', '.join(files)}); name one")
    return Path(files[0]) if files else None, [word for word in words if "=" in word]


def main(words: Sequence[str]) -> int:
    """The child: print a Resolved as JSON."""
    kind, *rest = words
    module, name = _CONFIGS[kind]
    try:
        config = load(getattr(importlib.import_module(module), name), *split_words(rest))
        workers = _workers(kind, config)
    except GptMoeError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    resolved = {"kind": kind, "config": to_dict(config), "workers": workers}
    sys.stdout.write(json.dumps(resolved, ensure_ascii=False))
    return 0


def _workers(kind: str, config: Any) -> int:
    if kind == "study":
        return int(config.study.parallel)
    return int(config.replicas.max if kind == "serve" else config.parallel.fewest_workers)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
