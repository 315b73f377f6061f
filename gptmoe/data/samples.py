"""Batches from a prepared folder, by global sample index.

B: samples of a batch, T: positions (seq_len), N: tokens of a split, R: rows of a split.
"""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptmoe.errors import ConfigError, DataError

from .manifest import Manifest, Split
from .order import Order

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Model inputs and what they should predict."""

    tokens_BT: Ints
    labels_BT: Ints  # the next token of each position
    weight_BT: Bools  # this label counts in the loss
    valid_BT: Bools  # this position has a next token: it is no padding


class Samples(ABC):
    """The samples of one split, the same for every reader and every number of readers.

    Global sample index i means row `order(i % num_samples)` of epoch `i // num_samples`. In
    training every epoch has its own permutation, a function of (seed, epoch); validation comes in
    order unless it is `shuffled`, so that its first samples are of all files. A rank asks for its
    slice of a batch and reads nothing else.
    """

    def __init__(
        self, folder: Path, split: Split, seq_len: int, seed: int, *, shuffled: bool = False
    ) -> None:
        """Map the files of `split`.

        Raises DataError if the folder is no sound prepared folder or holds too little for one
        sample of `seq_len` positions, ConfigError for a `seq_len` below 1 or a negative `seed`.
        """
        if seq_len < 1:
            raise ConfigError(f"data.seq_len={seq_len} must be at least 1")
        if seed < 0:
            raise ConfigError(f"run.seed={seed} must not be negative")
        self.manifest = Manifest.load(folder)
        self.split = split
        self.seq_len = seq_len
        self._where = f"the {split} split of {folder}"
        self._tokens_N = self.manifest.tokens(folder, split)
        if not len(self._tokens_N):
            raise DataError(
                f"{self._where} is empty; prepare with data.validation_fraction above 0 and at "
                "least two different documents, or name validation files"
            )
        self.num_samples = self._open(folder)
        self._order = Order(self.num_samples, seed if split == "train" or shuffled else None)

    def batch(self, first: int, count: int) -> Batch:
        """Global samples first .. first + count - 1, as arrays of shape [count, seq_len]."""
        start_B, length_B, loss_from_B = self._locate(self._order.rows(first, count))
        offset_S = np.arange(self.seq_len + 1)
        inside_BS = offset_S < length_B[:, None]
        position_BS = np.where(inside_BS, start_B[:, None] + offset_S, 0)
        tokens_BS = np.where(inside_BS, self._tokens_N[position_BS], 0).astype(np.int64)
        valid_BT = inside_BS[:, 1:]
        return Batch(
            tokens_BT=np.where(valid_BT, tokens_BS[:, :-1], 0),
            labels_BT=tokens_BS[:, 1:],
            weight_BT=valid_BT & (offset_S[1:] >= loss_from_B[:, None]),
            valid_BT=valid_BT,
        )

    @abstractmethod
    def _open(self, folder: Path) -> int:
        """Prepare for `_locate`; the number of samples."""

    @abstractmethod
    def _locate(self, row_B: Ints) -> tuple[Ints, Ints, Ints]:
        """For each row its first token, its number of tokens, and how many of them bear no loss."""


class TokenSamples(Samples):
    """Pretraining: row i is tokens i * T to i * T + T of the split, so that labels tile it.

    Training leaves out an incomplete last window; validation pads it, so that every token but the
    very first is a label exactly once.
    """

    def _open(self, folder: Path) -> int:
        num_labels = len(self._tokens_N) - 1
        if self.split == "validation":
            return -(-num_labels // self.seq_len)
        if num_labels < self.seq_len:
            raise DataError(
                f"{self._where} holds {num_labels + 1} tokens and one sample needs "
                f"{self.seq_len + 1}; give more text or set data.seq_len to {num_labels} or less"
            )
        return num_labels // self.seq_len

    def _locate(self, row_B: Ints) -> tuple[Ints, Ints, Ints]:
        start_B = row_B * self.seq_len
        length_B = np.minimum(len(self._tokens_N) - start_B, self.seq_len + 1)
        return start_B, length_B, np.zeros_like(row_B)


class LineSamples(Samples):
    """Finetuning: one row a sample, padded on the right, the end cut off beyond T + 1 tokens.

    Rows whose whole target would be cut off are left out, with a warning; `num_dropped` says how
    many.
    """

    num_dropped: int

    def _open(self, folder: Path) -> int:
        self._rows_R2 = self.manifest.rows(folder, self.split)
        loss_from_R = self._rows_R2[:, 1]
        self._kept = np.flatnonzero(loss_from_R <= self.seq_len)
        self.num_dropped = len(loss_from_R) - len(self._kept)
        if not len(self._kept):
            raise DataError(
                f"all {self.num_dropped} rows of {self._where} lose their whole target at "
                f"data.seq_len={self.seq_len}; set it to {loss_from_R.min()} or more"
            )
        if self.num_dropped:
            logger.warning(
                "%d of %d rows of %s are left out: their whole target lies beyond data.seq_len=%d",
                self.num_dropped,
                len(loss_from_R),
                self._where,
                self.seq_len,
            )
        return len(self._kept)

    def _locate(self, row_B: Ints) -> tuple[Ints, Ints, Ints]:
        kept_B = self._kept[row_B]
        start_B = np.where(kept_B > 0, self._rows_R2[kept_B - 1, 0], 0)
        length_B = np.minimum(self._rows_R2[kept_B, 0] - start_B, self.seq_len + 1)
        return start_B, length_B, self._rows_R2[kept_B, 1]


def open_samples(
    folder: Path,
    split: Split,
    seq_len: int,
    seed: int,
    expect_tokenizer: str | None = None,
    *,
    shuffled: bool = False,
) -> Samples:
    """The samples of a prepared folder, of the class that its manifest asks for.

    `expect_tokenizer` is the digest of the tokenizer that the model uses: DataError if the folder
    was prepared with another. Other errors as in `Samples`.
    """
    recipe = Manifest.load(folder).recipe
    if expect_tokenizer is not None and recipe.tokenizer_digest != expect_tokenizer:
        raise DataError(
            f"{folder} was prepared with tokenizer {recipe.tokenizer_digest}, "
            f"the model uses {expect_tokenizer}; prepare again with the model's tokenizer"
        )
    kind = TokenSamples if recipe.kind == "pretrain" else LineSamples
    return kind(folder, split, seq_len, seed, shuffled=shuffled)
