"""Checkpoints beside training: the loop waits for a copy in memory, a thread writes it.

The copy costs as much memory as this rank writes, kept from one checkpoint to the next: memory that
is there already is filled several times faster. One checkpoint is under way at a time. The
writing threads of the ranks meet in a process group of their own, so that they never take each
other's place in the loop's collectives.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptmoe import checkpoint
from gptmoe.checkpoint import Box, Piece
from gptmoe.errors import CheckpointError

log = logging.getLogger(__name__)

_LOOKS_EVERY_S = 1.0
SLOW_DISK_S = 7200.0
"""What takes longer than this to be written hangs."""

Groups = Mapping[str, Sequence[Piece]]


class Saver:
    """Writes one rank's part of each checkpoint. Collective: each rank makes the same calls."""

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world: int,
        barrier: Callable[[], None],
        config: Mapping[str, Any],
        copy_files: Callable[[Path], None],
        keep: int,
        warn: Callable[[str], None] = log.warning,
        saved: Callable[[Path], None] = lambda folder: None,
        waits: Callable[[], None] = lambda: None,
    ) -> None:
        """`barrier` is used by the writing thread alone. `warn` tells people of a failure, `saved`
        hears of each complete checkpoint, in the writing thread of rank 0. `waits` is called now
        and then, up to SLOW_DISK_S, while the loop waits for the writing thread."""
        self._folder = folder
        self._rank, self._world = rank, world
        self._barrier = barrier
        self._config = config
        self._copy_files = copy_files
        self._keep = keep
        self._warn = warn
        self._saved = saved
        self._waits = waits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None
        self._memory: dict[tuple[str, str, Box], Tensor] = {}

    def start(self, name: str, groups: Groups, progress: Mapping[str, Any]) -> float:
        """Copy the pieces and begin to write them; returns the seconds that the caller waited.

        Waits for the checkpoint before, if that is still being written. A failure of that one is a
        warning: training goes on, and earlier checkpoints are untouched.
        """
        began_s = time.perf_counter()
        self._settle(fatal=False)
        copies = {
            group: [replace(piece, tensor=self._copied(group, piece)) for piece in pieces]
            for group, pieces in groups.items()
        }
        self._under_way = self._thread.submit(self._write, name, copies, dict(progress))
        return time.perf_counter() - began_s

    def finish(self) -> None:
        """Wait for what is being written. Raises CheckpointError if that failed."""
        self._settle(fatal=True)

    def close(self) -> None:
        """End the thread; what it writes is written."""
        self._thread.shutdown()

    def _copied(self, group: str, piece: Piece) -> Tensor:
        key = group, piece.name, piece.box
        memory = self._memory.get(key)
        if memory is None or memory.dtype != piece.tensor.dtype:
            memory = torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype)
            self._memory[key] = memory
        memory.copy_(piece.tensor.detach())
        return memory

    def _settle(self, *, fatal: bool) -> None:
        if self._under_way is None:
            return
        limit_s = time.monotonic() + SLOW_DISK_S
        while not wait([self._under_way], timeout=_LOOKS_EVERY_S).done:
            if time.monotonic() < limit_s:
                self._waits()
        try:
            self._under_way.result()
        except CheckpointError as error:
            if fatal:
                raise
            self._warn(f"TRAINING GOES ON WITHOUT A NEW CHECKPOINT: {error}")
        finally:
            self._under_way = None

    def _write(self, name: str, groups: Groups, progress: Mapping[str, Any]) -> None:
        try:
            checkpoint.save(
                self._folder / name,
                rank=self._rank,
                world=self._world,
                barrier=self._barrier,
                groups=groups,
                config=self._config,
                progress=progress,
                copy_files=self._copy_files,
            )
            if self._rank == 0:
                self._saved(self._folder / name)
                checkpoint.prune(self._folder, self._keep, self._folder / name)
        finally:
            # All loops wait here alike: one alone would leave the others hanging. One that failed
            # alone, too: else the barriers of the next checkpoint would be out of step.
            self._barrier()
