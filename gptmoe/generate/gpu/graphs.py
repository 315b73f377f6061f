"""Decoding steps as CUDA graphs: thousands of small kernels started by one call.

Letters: R rows (one of each sequence), V vocabulary.
"""

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from gptmoe.generate.executor import scores
from gptmoe.model.transformer import GPT

from .attention import PagedAttend
from .cache import PagedCache
from .products import routed
from .streams import own_stream

EXACT = 8
"""Up to so many rows there is a graph for each number, then for each multiple of it."""


@dataclass(frozen=True, slots=True)
class _Graph:
    row_3R: Tensor
    """Token, position and slot; written before each run."""
    logits_RV: Tensor
    graph: torch.cuda.CUDAGraph


class DecodingGraphs:
    """Captured steps of one version of the weights, for 1 to `most` sequences.

    They share their memory: only one runs at a time. Each is captured when it is needed first, or
    all before, by `capture`.
    """

    def __init__(self, model: GPT, cache: PagedCache, most: int) -> None:
        self._model, self._cache = model, cache
        self._sizes = sizes(most)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream | None = None
        self._graphs: dict[int, _Graph] = {}

    def capture(self) -> None:
        """Capture all that there may be, so that no request waits for it."""
        for size in reversed(self._sizes):  # the largest first: the others fit into its memory
            self._of(size)

    @torch.inference_mode()
    def run(self, row_3R: Tensor) -> Tensor:
        """Scores [R, V] of these rows; valid until the next run."""
        count = row_3R.shape[1]
        graph = self._of(self._sizes[bisect_left(self._sizes, count)])
        padding = graph.row_3R.shape[1] - count
        graph.row_3R.copy_(padded(row_3R, padding, self._cache.idle), non_blocking=True)
        graph.graph.replay()
        return graph.logits_RV[:count]

    def _of(self, size: int) -> _Graph:
        if size not in self._graphs:
            self._stream = self._stream or own_stream(self, self._cache.device)
            try:
                self._graphs[size] = self._capture(size, self._stream)
            except BaseException:
                self._graphs = {}  # what failed took along what they need: see streams.py
                raise
        return self._graphs[size]

    @torch.inference_mode()
    def _capture(self, size: int, stream: torch.cuda.Stream) -> _Graph:
        device = self._cache.device
        row_3R = padded(torch.zeros(3, 0, dtype=torch.int64), size, self._cache.idle).to(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # kernels are compiled, libraries wake up
            decode(self._model, self._cache, row_3R)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of a replica may use the device meanwhile: they read newer weights.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            logits_RV = decode(self._model, self._cache, row_3R)
        return _Graph(row_3R, logits_RV, graph)


def decode(model: GPT, cache: PagedCache, row_3R: Tensor) -> Tensor:
    """One token of each row's sequence; scores [R, V]. It never waits for the device."""
    token_1R, position_1R, slot_R = row_3R[:1], row_3R[1:2], row_3R[2]
    live_R = (slot_R != cache.idle).long()
    for layer in routed(model):
        layer.live_T = live_R
    attend = PagedAttend(cache, slot_R, position_1R[0])
    return scores(model, model(token_1R, position_1R, attend=attend).hidden_BTD[0])


def padded(row_3R: Tensor, padding: int, idle: int) -> Tensor:
    """With rows of the idle slot behind: the last token again, alone, for nobody."""
    if not padding:
        return row_3R
    row_31 = row_3R[:, -1:] if row_3R.shape[1] else row_3R.new_zeros(3, 1)
    idle_31 = row_31 * row_3R.new_tensor([[1], [0], [0]]) + row_3R.new_tensor([[0], [0], [idle]])
    return torch.cat((row_3R, idle_31.expand(-1, padding)), 1)


def sizes(most: int) -> list[int]:
    """Numbers of rows that there are graphs for."""
    return [*range(1, min(most, EXACT) + 1), *range(2 * EXACT, most + EXACT, EXACT)]
