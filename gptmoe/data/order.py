"""The order in which samples are drawn: a function of (seed, epoch) and nothing else."""

import numpy as np
import numpy.typing as npt


class Order:
    """Maps a global sample index to a row: epoch e covers the indices e * num_rows onwards, each
    row once.

    With a seed every epoch has its own permutation; with None rows come in order. Only the
    permutation of one epoch is kept, at 4 bytes a row below 2**32 rows. It sorts the raw stream of
    a bit generator, which numpy never changes, so that a run resumed under another numpy sees the
    same order.
    """

    def __init__(self, num_rows: int, seed: int | None) -> None:
        self._num_rows = num_rows
        self._seed = seed
        self._epoch = -1
        self._row_of: npt.NDArray[np.unsignedinteger] = np.empty(0, np.uint32)

    def rows(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """The rows [count] of the global sample indices first, first + 1, ..."""
        index_B = np.arange(first, first + count, dtype=np.int64)
        epoch_B, row_B = np.divmod(index_B, self._num_rows)
        if self._seed is not None:
            for epoch in np.unique(epoch_B):
                inside_B = epoch_B == epoch
                row_B[inside_B] = self._permutation(self._seed, int(epoch))[row_B[inside_B]]
        return row_B

    def _permutation(self, seed: int, epoch: int) -> npt.NDArray[np.unsignedinteger]:
        if epoch != self._epoch:
            keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(
                self._num_rows
            )
            dtype = np.uint32 if self._num_rows < 2**32 else np.uint64
            self._row_of = np.argsort(keys, kind="stable").astype(dtype)
            self._epoch = epoch
        return self._row_of
