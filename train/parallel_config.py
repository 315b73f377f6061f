"""How a run is spread over workers: the table [parallel] of a training config."""

from dataclasses import dataclass
from typing import Literal

from gptmoe.errors import LayoutError
from gptmoe.parallel.layout import Layout, smallest_dp
from gptmoe.parallel.schedules import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """The layout; see gptmoe/parallel/layout.py. World = dp x tp x pp."""

    dp: int | None = None
    """Data-parallel ranks; default: the smallest number that fits ep."""
    tp: int = 1
    """Ranks that hold slices of each weight."""
    ep: int = 1
    """Ranks that share the experts of a layer; divides dp x tp."""
    pp: int = 1
    """Pipeline stages."""
    zero: Literal[0, 1, 2, 3] = 0
    """0: our own optimizer step. DeepSpeed's ZeRO 1 shards the optimizer's state over dp, 2 the
    gradients, too (pp = 1 only). 3 shards the weights, too (dense models, dp alone)."""
    offload: bool = False
    """With zero = 3: weights, gradients and optimizer stay in the host's memory, the step runs on
    its cores; a GPU holds one layer's weights and the activations."""
    expert_tp: bool = False
    """Cut experts by tp, too, instead of spreading them over its ranks; ep then divides dp."""
    sequence_parallel: bool = True
    """With tp > 1: norms and dropout, too, work on slices of the sequence."""
    schedule: Kind = "1f1b"
    """Of the pipeline: gpipe, 1f1b, or interleaved, which needs chunks > 1."""
    chunks: int = 1
    """Groups of layers on each stage."""
    chunk_layers: tuple[int, ...] = ()
    """Layers of each of the pp x chunks groups; default: as equal as can be."""

    min_workers: int | None = None
    """Elastic: the run starts and goes on where so many workers or more are there, up to
    dp x tp x pp, in the layout nearest to the one given; the batch stays, and workers that it
    cannot be shared with stay idle. Default: waits for all of them."""
    resize_every_s: float = 60.0
    """How often an elastic run looks whether there are more workers to be had."""

    def __post_init__(self) -> None:
        if self.min_workers is not None and self.min_workers < 1:
            raise LayoutError(f"parallel.min_workers={self.min_workers} must be at least 1")
        if self.min_workers is not None and self.min_workers > self.layout().world:
            raise LayoutError(
                f"parallel.min_workers={self.min_workers} is more than the layout's "
                f"{self.layout().world} workers; use fewer or a larger parallel.dp"
            )
        if self.zero == 2 and self.pp > 1:
            raise LayoutError(
                f"parallel.zero=2 reduces gradients after each microbatch, which the stages of "
                f"parallel.pp={self.pp} still add to; use parallel.zero=1 or parallel.pp=1"
            )

        if self.offload and self.zero != 3:
            raise LayoutError(
                f"parallel.offload=true moves what parallel.zero=3 shards, found zero={self.zero}; "
                "use parallel.zero=3 (dense models, dp alone) or parallel.offload=false"
            )

    @property
    def fewest_workers(self) -> int:
        """Workers that the run must have to start."""
        return self.min_workers or self.layout().world

    def layout(self) -> Layout:
        """The layout asked for."""
        return Layout(
            dp=smallest_dp(self.ep, self.tp, expert_tp=self.expert_tp)
            if self.dp is None
            else self.dp,
            tp=self.tp,
            ep=self.ep,
            pp=self.pp,
            expert_tp=self.expert_tp,
            sequence_parallel=self.sequence_parallel,
            chunks=self.chunks,
            chunk_layers=self.chunk_layers,
            sharded=self.zero == 3,
        )
