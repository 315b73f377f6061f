"""The command: arguments to a ServeConfig, endpoints to whoever asked, signals to an exit code."""

import argparse
import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TextIO

from cluster import env
from gptmoe.config import load
from gptmoe.errors import ConfigError, GptMoeError

from .config import ServeConfig
from .launch import Endpoints, running

_ASKED_TO_STOP = 0
_REFUSED = 2
_INTERRUPTED = 130
_LOOK_EVERY_S = 0.5
_ASKS = "  (it asks for the token in ~/.ray/auth_token)"


class Sigterm:
    """Handles SIGTERM: ends what the main thread does now, and remembers, should that be lost."""

    def __init__(self) -> None:
        self.received = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        raise SystemExit(signal.SIGTERM)


def main(arguments: Sequence[str]) -> int:
    """Serve until a signal: 0 after SIGTERM, 130 after Ctrl-C; 2 and a sentence on bad input."""
    options = _parser().parse_intermixed_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    sigterm, out = Sigterm(), sys.stdout
    signal.signal(signal.SIGTERM, sigterm)
    try:
        with (
            contextlib.redirect_stdout(sys.stderr),  # what Ray prints; ours is for the endpoints
            running(read_config(options)) as endpoints,
            announced(endpoints, options, out),
        ):
            while not sigterm.received:
                time.sleep(_LOOK_EVERY_S)
    except GptMoeError as error:
        sys.stderr.write(f"error: {error}\n")
        return _REFUSED
    except KeyboardInterrupt:
        return _INTERRUPTED
    except SystemExit as exit:
        if exit.code != signal.SIGTERM:  # what Sigterm raises, and Ray's own while Ray starts
            raise
    return _ASKED_TO_STOP


def read_config(options: argparse.Namespace) -> ServeConfig:
    """The config file and overrides, with --checkpoint and --address as the last words."""
    words: list[str] = options.words
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"found {len(files)} config files ({', '.join(files)}); name one at most")
    overrides = [word for word in words if "=" in word]
    if options.edge_only:
        overrides.append("edge.only=true")
    for key in ("checkpoint", "address"):
        if (value := getattr(options, key)) is not None:
            overrides.append(f"{key}={json.dumps(value, ensure_ascii=False)}")
    return load(ServeConfig, Path(files[0]) if files else None, overrides)


@contextlib.contextmanager
def announced(endpoints: Endpoints, options: argparse.Namespace, out: TextIO) -> Iterator[None]:
    """Say where the model answers: into a file that goes at the end, then to people or as JSON."""
    facts = json.dumps(asdict(endpoints), ensure_ascii=False) + "\n"
    file: Path | None = options.state_file
    try:
        if file:
            _write(file, facts)
        out.write(facts if options.json else _for_people(endpoints))
        out.flush()
        yield
    finally:
        if file:
            file.unlink(missing_ok=True)


def _write(file: Path, text: str) -> None:
    """Whole or not at all: somebody is waiting for it."""
    part = file.with_name(file.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        raise ConfigError(f"--state-file {file} cannot be written: {error}") from None


def _for_people(endpoints: Endpoints) -> str:
    grpc = f"  gRPC       {endpoints.grpc}\n" if endpoints.grpc else ""
    edge = f"  gRPC edge  {endpoints.edge}\n" if endpoints.edge else ""
    return (
        f"{endpoints.name} answers, with {endpoints.checkpoint}\n"
        f"{grpc}{edge}"
        f"  HTTP       {endpoints.http}/v1 (OpenAI's API), /generate\n"
        f"  dashboard  {endpoints.dashboard}{_ASKS if env.uses_token() else ''}\n"
        "Ctrl-C stops it.\n"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve", description="Serve a checkpoint over gRPC and HTTP with Ray Serve."
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG.toml | key=value")
    parser.add_argument("--checkpoint", metavar="DIR|URI", help="a checkpoint, or a run's folder")
    parser.add_argument("--address", help="join this Ray cluster; without: start a local one")
    parser.add_argument(
        "--edge-only",
        action="store_true",
        help="gRPC with TLS and keys only (edge.port, else 9443)",
    )
    parser.add_argument("--json", action="store_true", help="print the endpoints as one JSON line")
    parser.add_argument("--state-file", type=Path, metavar="PATH", help="keep them here as JSON")
    return parser
