"""Saving as several ranks: threads that meet at a real barrier."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from gptmoe.checkpoint import Piece, save

Groups = Mapping[str, Sequence[Piece]]
SaveInRanks = Callable[..., list[BaseException | None]]


@pytest.fixture
def save_in_ranks() -> SaveInRanks:
    """Save one checkpoint from several ranks; returns what each rank raised, None for success."""

    def save_all(
        folder: Path,
        parts: Sequence[Groups],
        *,
        config: Mapping[str, Any] | None = None,
        progress: Mapping[str, Any] | None = None,
        copy_files: Callable[[Path], None] | None = None,
    ) -> list[BaseException | None]:
        meeting = Barrier(len(parts), timeout=10)

        def barrier() -> None:
            meeting.wait()

        def one(rank: int) -> None:
            save(
                folder,
                rank=rank,
                world=len(parts),
                barrier=barrier,
                groups=parts[rank],
                config=config or {},
                progress=progress or {},
                copy_files=copy_files,
            )

        with ThreadPoolExecutor(len(parts)) as pool:
            ranks = [pool.submit(one, rank) for rank in range(len(parts))]
            return [rank.exception() for rank in ranks]

    return save_all
