"""The command: arguments to a ServeConfig, endpoints to whoever asked, signals to an exit code."""

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from gptmoe.config import load
from gptmoe.errors import ConfigError, GptMoeError

from .config import ServeConfig
from .launch import Endpoints, running

_ASKED_TO_STOP = 0
_REFUSED = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str]) -> int:
    """Serve until a signal: 0 after SIGTERM, 130 after Ctrl-C; 2 and a sentence on bad input."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        with running(read_config(options)) as endpoints, announced(endpoints, options):
            threading.Event().wait()
    except GptMoeError as error:
        sys.stderr.write(f"error: {error}\n")
        return _REFUSED
    except KeyboardInterrupt:
        return _INTERRUPTED
    except SystemExit:  # by SIGTERM: our handler raises it, and so does Ray's while Ray starts
        return _ASKED_TO_STOP
    raise AssertionError("only a signal ends the wait")


def read_config(options: argparse.Namespace) -> ServeConfig:
    """The config file and overrides, with --checkpoint and --address as the last words."""
    words: list[str] = options.words
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"found {len(files)} config files ({', '.join(files)}); name one at most")
    overrides = [word for word in words if "=" in word]
    for key in ("checkpoint", "address"):
        if (value := getattr(options, key)) is not None:
            overrides.append(f"{key}={json.dumps(value, ensure_ascii=False)}")
    return load(ServeConfig, Path(files[0]) if files else None, overrides)


@contextmanager
def announced(endpoints: Endpoints, options: argparse.Namespace) -> Iterator[None]:
    """Say where the model answers: to people, as a JSON line, into a file that goes at the end."""
    facts = json.dumps(asdict(endpoints), ensure_ascii=False)
    sys.stdout.write(facts + "\n" if options.json else _for_people(endpoints))
    sys.stdout.flush()
    if options.state_file is None:
        yield
        return
    part = options.state_file.with_name(options.state_file.name + ".part")
    try:
        part.write_text(facts + "\n", encoding="utf-8")
        os.replace(part, options.state_file)
    except OSError as error:
        raise ConfigError(f"--state-file {options.state_file} cannot be written: {error}") from None
    try:
        yield
    finally:
        options.state_file.unlink(missing_ok=True)


def _for_people(endpoints: Endpoints) -> str:
    return (
        f"{endpoints.name} answers, with {endpoints.checkpoint}\n"
        f"  gRPC       {endpoints.grpc}\n"
        f"  HTTP       {endpoints.http}/generate\n"
        f"  dashboard  {endpoints.dashboard}\n"
        "Ctrl-C stops it.\n"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve", description="Serve a checkpoint over gRPC and HTTP with Ray Serve."
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG.toml | key=value")
    parser.add_argument("--checkpoint", metavar="DIR", help="a checkpoint, or the folder of a run")
    parser.add_argument("--address", help="join this Ray cluster; without: start a local one")
    parser.add_argument("--json", action="store_true", help="print the endpoints as one JSON line")
    parser.add_argument("--state-file", type=Path, metavar="PATH", help="keep them here as JSON")
    return parser


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit
