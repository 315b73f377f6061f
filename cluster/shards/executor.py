"""The engine's side of the data plane: an Executor whose model lives on shards."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster.messages import Step, StepDone
from gptmoe.errors import ClusterError
from gptmoe.generate.plan import StepPlan
from gptmoe.shard.parts import Part, layout_of

from .routes import entries, exits
from .split import pieces, share
from .step_loop import Line


@dataclass(slots=True)
class Costs:
    """Seconds of all steps so far, as the engine saw them."""

    steps: int = 0
    total_s: float = 0.0
    compute_s: float = 0.0
    """Of all stages, for the data rank that had most to do."""
    exchange_s: float = 0.0
    """The same, with rows on their way to experts and back."""


class ShardsExecutor:
    """Runs step plans on the shards of one epoch. One thread uses it."""

    def __init__(
        self, parts: Sequence[Part], line: Line, epoch: int, vocab_size: int, dtype: torch.dtype
    ) -> None:
        self.parts, self.epoch = parts, epoch
        self.costs = Costs()
        self._line = line
        self._dp = layout_of(parts).dp
        self._pp = layout_of(parts).pp
        self._entries, self._exits = entries(parts), exits(parts)
        self._vocab_size, self._dtype = vocab_size, dtype
        self._sequence = 0

    @property
    def banks(self) -> int:
        """See Executor.banks."""
        return self._dp

    def run(self, plan: StepPlan, tokens: Mapping[str, Sequence[int]]) -> Tensor:
        """See Executor.run. Raises ClusterError if a shard is lost."""
        began_s = time.perf_counter()
        sent = [self._send(piece, tokens) for piece in pieces(plan, self._pp)]
        scores = [self._receive(sequence, order) for sequence, order in sent]
        self.costs.steps += 1
        self.costs.total_s += time.perf_counter() - began_s
        return scores[0] if len(scores) == 1 else torch.cat(scores)

    def beat(self) -> None:
        """Send a sign of life through all shards and wait until it is back: an idle group would
        run into its timeout. Raises ClusterError if a shard is lost."""
        self._sequence += 1
        step = Step(epoch=self.epoch, sequence=self._sequence, version=0)
        for rank in self._entries:
            self._line.send(step, rank)
        alone = [rank for rank, part in enumerate(self.parts) if part.experts_only]
        for rank in [*self._exits, *alone]:
            self._done(rank, self._sequence)

    def _send(
        self, plan: StepPlan, tokens: Mapping[str, Sequence[int]]
    ) -> tuple[int, tuple[int, ...]]:
        self._sequence += 1
        shares = share(plan, tokens, self._dp, epoch=self.epoch, sequence=self._sequence)
        nothing = replace(shares.steps[0], spans=(), num_decoding=0, token_ids=())
        for rank in self._entries:
            part = self.parts[rank]
            self._line.send(nothing if part.experts_only else shares.steps[part.data], rank)
        return self._sequence, shares.order

    def _receive(self, sequence: int, order: tuple[int, ...]) -> Tensor:
        """The scores of one piece, [S, V]: data ranks below each other, slices side by side."""
        slices: dict[int, list[Tensor]] = {}
        dones: list[StepDone] = []
        for rank in self._exits:
            part, done = self.parts[rank], self._done(rank, sequence)
            first, end = (
                self._vocab_size * index // part.slices for index in (part.slice, part.slice + 1)
            )
            rows = torch.empty(done.rows, end - first, dtype=self._dtype)
            if done.rows:
                self._line.receive_tensor(rows, rank)
            slices.setdefault(part.data, []).append(rows)
            dones.append(done)
        slowest = max(dones, key=lambda done: done.compute_s)
        self.costs.compute_s += slowest.compute_s
        self.costs.exchange_s += slowest.exchange_s
        whole = torch.cat([torch.cat(rows, 1) for _, rows in sorted(slices.items())])
        return whole if order == tuple(range(len(whole))) else whole[list(order)]

    def _done(self, rank: int, sequence: int) -> StepDone:
        done = self._line.receive(rank)
        if not isinstance(done, StepDone) or (done.epoch, done.sequence) != (self.epoch, sequence):
            raise ClusterError(f"rank {rank} answers {done}, not step {sequence}")
        return done
