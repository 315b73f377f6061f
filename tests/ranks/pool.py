"""Gloo processes that live as long as the tests: only their groups are made anew.

    pool.run(2, body, argument)   # [body(0, argument), body(1, argument)], in a group of two ranks

The body is a function of a module (it travels by name); what it raises comes back as RankError.
"""

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, TypeVar

import torch
import torch.distributed as dist

R = TypeVar("R")

LIMIT_S = 600.0
"""A run that takes longer is a failure; a failure costs the processes their lives.

Most take two seconds, but they run beside other tests, which go first.
"""
GROUP_TIMEOUT = timedelta(seconds=300)
"""A rank that waits longer in a collective fails there, which shows where it was."""


class RankError(AssertionError):
    """A rank failed, died or hung; holds its traceback."""


@dataclass(frozen=True, slots=True)
class _Job:
    rank: int
    world: int
    port: int
    timeout: timedelta
    body: Callable[..., Any]
    arguments: tuple[object, ...]


class RankPool:
    """`size` processes with one thread each. Use it in a `with`: they are killed at its end."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._start()

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *error: object) -> None:
        self._kill()

    def run(
        self,
        world: int,
        body: Callable[..., R],
        *arguments: object,
        limit_s: float = LIMIT_S,
        group_timeout: timedelta = GROUP_TIMEOUT,
    ) -> list[R]:
        """Results of `body(rank, *arguments)` by rank, or RankError with the failures."""
        assert world <= self.size
        self._store = _store()  # lives until the next run: a new port for each
        for rank, pipe in enumerate(self._pipes[:world]):
            job = _Job(rank, world, self._store.port, group_timeout, body, arguments)
            pipe.send_bytes(pickle.dumps(job))
        try:
            return self._collect(world, time.monotonic() + limit_s)
        except RankError:  # the others wait for a peer that will not come
            self._kill()
            self._start()
            raise

    def _collect(self, world: int, deadline_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes[:world])}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise RankError(f"ranks still running: {', '.join(map(str, waiting.values()))}")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    results[rank], trace = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    trace = "the process died"
                if trace:
                    raise RankError(f"rank {rank} of {world}: {trace}")
        return [results[rank] for rank in range(world)]

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        # Imported once, not by each process; every optimizer of torch imports the second.
        context.set_forkserver_preload(["torch", "torch._dynamo"])
        self._pipes: list[Connection] = []
        self._processes: list[ForkServerProcess] = []
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()


def _store(port: int | None = None) -> Any:
    """The pool's end of a store, at a port of its choice, or a rank's end at `port`."""
    return dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port or 0, is_master=port is None, wait_for_workers=False
    )


def _serve(pipe: Connection) -> None:
    """A process's life: run jobs until it is killed."""
    torch.set_num_threads(1)
    while True:
        job: _Job = pickle.loads(pipe.recv_bytes())
        try:
            if dist.is_initialized():  # only now has every rank of the last run left its group
                dist.destroy_process_group()
            dist.init_process_group(
                "gloo",
                store=_store(job.port),
                rank=job.rank,
                world_size=job.world,
                timeout=job.timeout,
            )
            answer = pickle.dumps((job.body(job.rank, *job.arguments), ""))
        except BaseException:  # noqa: BLE001 - whatever it is, the test must see it
            answer = pickle.dumps((None, traceback.format_exc()))
        pipe.send_bytes(answer)
