"""What Ray Serve and the edge cost over the bare engine; overload; ten thousand requests.

    python -m tests.bench.bench_serving overhead [--rounds 7] [--json FILE]
    python -m tests.bench.bench_serving overload [--seconds 30]
    python -m tests.bench.bench_serving memory [--requests 10000]

One model (12 x 768 with 8 experts, bfloat16, random weights) on one replica, its callers on the
same cores: so these are upper bounds of what serving costs. Wants the machine for itself.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

import gptmoe
from cluster.client import Client
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request
from gptmoe.generate.scheduler import EngineConfig
from serve.config import EdgeConfig, ServeConfig
from serve.launch import Endpoints, running
from tests import small_model
from tests.bench import serving_load as load
from tests.bench.side_by_side import between, seconds_of

T = TypeVar("T")

BARE = "bare engine"
FIRST_TOKEN_GOAL_MS = 12.0
THROUGHPUT_GOAL = 0.75
OVERLOAD_GOAL = 0.9
MEMORY_GOAL = 1.05
FIRST_TOKENS = 8
"""Timed in each round."""
TOGETHER = 16
"""Streams at a time where throughput is measured."""


@contextmanager
def served() -> Iterator[tuple[Path, Endpoints]]:
    """A replica on two ports, and the checkpoint that it serves."""
    with tempfile.TemporaryDirectory() as folder:
        path = small_model.write(Path(folder), num_layers=12, d_model=768)
        config = ServeConfig(
            checkpoint=path,
            dtype="bfloat16",
            http_port=0,
            grpc_port=0,
            edge=EdgeConfig(port=0),
            engine=EngineConfig(max_batch_size=TOGETHER, max_queue=2 * TOGETHER),
        )
        with running(config) as endpoints:
            yield path, endpoints


class Bare:
    """The engine in this process, as a replica runs it."""

    def __init__(self, path: Path) -> None:
        self._model = gptmoe.load(path, dtype="bfloat16")
        self._engine = self._model.engine(EngineConfig(max_batch_size=TOGETHER))

    def first_token(self) -> load.FirstToken:
        """A prompt's first token."""
        self._add(load.prompt(), 1)
        seconds = seconds_of(self._run_out)
        return load.FirstToken(seconds, seconds)

    def throughput(self) -> float:
        """Tokens a second of streams that run together."""

        def act() -> None:
            for _ in range(TOGETHER):
                self._add(load.prompt(), load.NEW_TOKENS)
            self._run_out()

        return TOGETHER * load.NEW_TOKENS / seconds_of(act)

    def _add(self, prompt: str, new_tokens: int) -> None:
        ids = tuple(self._model.tokenizer.encode(prompt))
        sampling = SamplingParams(max_new_tokens=new_tokens, temperature=0, ignore_end=True)
        self._engine.add(Request(prompt, ids, sampling))

    def _run_out(self) -> None:
        while self._engine.has_work:
            self._engine.step()


def overhead(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """First tokens one at a time, then streams together: bare, Ray Serve's port, the edge."""
    with served() as (path, endpoints):
        bare = Bare(path)
        one: dict[str, Callable[[], load.FirstToken]] = {BARE: bare.first_token}
        many: dict[str, Callable[[], float]] = {BARE: bare.throughput}
        for name, target in (("Ray Serve", endpoints.grpc), ("the edge", endpoints.edge)):
            one[name] = load.caller_of_one(target)
            many[name] = load.caller_of_many(target, TOGETHER)
        firsts = _in_turns(one, FIRST_TOKENS * arguments.rounds, warmups=FIRST_TOKENS)
        rates = _in_turns(many, arguments.rounds, warmups=1)
    return [_cost(name, firsts, rates) for name in (BARE, "Ray Serve", "the edge")]


def _in_turns(acts: Mapping[str, Callable[[], T]], rounds: int, warmups: int) -> dict[str, list[T]]:
    """What each found, round by round: the machine's moods hit all of them."""
    found: dict[str, list[T]] = {name: [] for name in acts}
    for number in range(-warmups, rounds):
        for name, act in acts.items():
            result = act()
            if number >= 0:
                found[name].append(result)
    return found


def _cost(
    name: str, firsts: Mapping[str, list[load.FirstToken]], rates: Mapping[str, list[float]]
) -> dict[str, Any]:
    """One way's medians next to the bare engine's, printed."""
    over_ms = [
        1e3 * (mine.seconds - bare.seconds)
        for mine, bare in zip(firsts[name], firsts[BARE], strict=True)
    ]
    way_ms = [1e3 * (mine.seconds - mine.in_engine_s) for mine in firsts[name]]
    parts = [mine / bare for mine, bare in zip(rates[name], rates[BARE], strict=True)]
    facts = {
        "first_ms": 1e3 * median(first.seconds for first in firsts[name]),
        "over_ms": median(over_ms),
        "way_ms": median(way_ms),
        "tokens_per_s": median(rates[name]),
        "part": median(parts),
    }
    print(
        f"{name:12} first token {facts['first_ms']:6.1f} ms (+{facts['over_ms']:.1f}), "
        f"outside the engine {facts['way_ms']:.1f}{between(way_ms, 1, '.1f')}; "
        f"{TOGETHER} streams {facts['tokens_per_s']:.0f} tokens/s: "
        f"{facts['part']:.2f} of bare{between(parts, 1, '.2f')}"
    )
    reached = facts["over_ms"] <= FIRST_TOKEN_GOAL_MS and facts["part"] >= THROUGHPUT_GOAL
    return {"title": f"serving, {name}", "reached": reached, **facts}


def overload(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Goodput when three times as many requests come as can be answered."""
    with served() as (_, endpoints):
        peak = asyncio.run(load.closed_loop(endpoints.grpc, TOGETHER, arguments.seconds))
        rate = 3 * peak.answered / arguments.seconds
        found = asyncio.run(load.open_loop(endpoints.grpc, rate, arguments.seconds, endpoints.http))
    part = (found.tokens / found.seconds) / (peak.tokens / peak.seconds)
    print(
        f"peak {peak.tokens / peak.seconds:.0f} tokens/s; at 3 times its requests "
        f"{found.tokens / found.seconds:.0f} ({part:.2f}; goal {OVERLOAD_GOAL}), "
        f"{found.refused} of {found.asked} refused, {found.failed} failed, "
        f"liveness {'green' if found.alive else 'RED'}"
    )
    reached = part >= OVERLOAD_GOAL and found.alive and not found.failed
    return [{"title": "3 times overload", "reached": reached, "part": part}]


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Growth of a replica over many requests of four prompt lengths."""
    with served() as (_, endpoints):
        pid = load.replica_pid()
        asyncio.run(load.many(endpoints.grpc, arguments.requests // 10))
        before = load.resident_bytes(pid)
        asyncio.run(load.many(endpoints.grpc, arguments.requests))
        after = load.resident_bytes(pid)
        with Client(endpoints.grpc) as client:
            client.generate("春风", max_new_tokens=1)
    growth = after / before
    print(
        f"{arguments.requests} requests: {before / 1e6:.0f} MB, then {after / 1e6:.0f} "
        f"({growth:.3f} times; goal {MEMORY_GOAL})"
    )
    return [{"title": "memory of requests", "reached": growth <= MEMORY_GOAL, "growth": growth}]


def main() -> None:
    """Run one of the three, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
        "overhead": overhead,
        "overload": overload,
        "memory": memory,
    }
    parser.add_argument("what", nargs="?", choices=tuple(parts), help="one of the three; else all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    began_s = time.monotonic()
    torch.set_num_threads(2)
    wanted = [arguments.what] if arguments.what else list(parts)
    facts = [fact for name in wanted for fact in parts[name](arguments)]
    print(f"{time.monotonic() - began_s:.0f} s in all")
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
