"""One rank's part of a served model: its weights, its part of the KV cache, and a step through it.

Letters: T tokens of this data rank, D model width, S sampled rows, V vocabulary, E experts.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gptmoe.checkpoint import Checkpoint
from gptmoe.generate.cache import KVCache
from gptmoe.generate.executor import hidden_states, output_rows, scores
from gptmoe.generate.plan import SlotCopy, SlotSpan
from gptmoe.model.dispatch import CountedDispatcher, Dispatcher, LocalDispatcher
from gptmoe.model.experts import Experts
from gptmoe.model.moe import MoE
from gptmoe.model.routing import Routing, Statistics
from gptmoe.model.spec import ModelSpec
from gptmoe.model.turns import Pausing, straight
from gptmoe.parallel.tensor import Slices

from .dispatch import Exchange, PlacedDispatcher
from .load import Progress, Weights, load_part
from .parts import Part, held, layout_of, stage_ranks, travels

FIXED_ROWS = 64
"""With room for more rows than that a message of one size is slower than counts and then rows."""


class Work(Protocol):
    """What one step runs on one data rank."""

    @property
    def version(self) -> int: ...
    @property
    def spans(self) -> Sequence[SlotSpan]: ...
    @property
    def copies(self) -> Sequence[SlotCopy]: ...
    @property
    def num_decoding(self) -> int: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def most_rows(self) -> int: ...
    @property
    def fixed(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of one step."""

    compute_s: float
    exchange_s: float


class Shard:
    """Layers x experts x slice of a model, in one or more versions of its weights.

    Invariant: all ranks of a stage run the same steps in the same order, those without tokens too:
    their experts answer the others.
    """

    def __init__(
        self,
        spec: ModelSpec,
        parts: Sequence[Part],
        rank: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.spec, self.parts, self.rank = spec, parts, rank
        self.part = parts[rank]
        self.dtype, self.device = dtype, device
        self.layout = layout_of(parts)
        self.load_of = {
            layer: [0] * spec.experts_in_layer(layer)
            for layer in self.part.layers
            if spec.experts_in_layer(layer)
        }
        """Rows that each expert held here has answered, by layer."""
        self._rows_of_token = most_rows_of_token(spec, parts)
        self._exchange = Exchange()
        self._versions: dict[int, Weights] = {}
        self._dispatchers: dict[int, Dispatcher] = {}
        self._slices: Slices | None = None
        self._slots = slots
        self._cache: KVCache | None = None

    @property
    def is_first(self) -> bool:
        """Whether tokens enter here."""
        return self.part.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether scores leave here."""
        return self.part.stage == self.layout.pp - 1

    @property
    def num_bytes(self) -> int:
        """Of all weights held."""
        return sum(weights.num_bytes for weights in self._versions.values())

    def has(self, version: int) -> bool:
        """Whether these weights are here."""
        return version in self._versions

    def load(
        self, checkpoint: Checkpoint, version: int, progress: Progress = lambda done, total: None
    ) -> None:
        """Read a version of the weights beside those that are here."""
        weights = load_part(
            checkpoint, self.spec, self.parts, self.rank, self.dtype, self.device, progress
        )
        self._versions[version] = weights
        self._attach(weights)

    def keep(self, versions: Sequence[int]) -> None:
        """Let go of all versions but these."""
        self._versions = {v: weights for v, weights in self._versions.items() if v in versions}

    def connect(
        self, rows_group: dist.ProcessGroup | None, slices_group: dist.ProcessGroup | None
    ) -> None:
        """Use these groups from now on: of the stage, and of the slices of the same samples. The KV
        cache starts empty."""
        self._exchange = Exchange(rows_group)
        part = self.part
        self._slices = None
        if part.slices > 1 and not part.experts_only:
            self._slices = Slices(slices_group, part.slice, part.slices, sequence_parallel=False)
        self._dispatchers = {layer: self._dispatcher(layer) for layer in self.load_of}
        for weights in self._versions.values():
            self._attach(weights)
        layers = range(part.layers[0], part.layers[-1] + 1)
        if not part.experts_only:
            self._cache = KVCache(
                self.spec, self._slots, self.dtype, self.device, layers, part.slices
            )

    def disconnect(self) -> None:
        """Forget the groups: as long as somebody knows them their peers wait."""
        self._exchange = Exchange()
        self._slices = None
        self._dispatchers = {}
        for weights in self._versions.values():
            for module in weights.model.modules() if weights.model else ():
                if isinstance(module, MoE):
                    module.dispatcher = LocalDispatcher()
                elif hasattr(module, "slices"):
                    setattr(module, "slices", None)  # noqa: B010  no parameter

    def run(self, work: Work, x_TD: Tensor | None) -> tuple[Tensor, Spent]:
        """Run one step; hidden states before this stage in, those behind it out, or scores [S, V].

        Ranks of experts alone return nothing [0, D]. With tensor parallelism the scores are those
        of this slice's part of the vocabulary. Collective over the stage.
        """
        began_s = time.perf_counter()
        rows = work.most_rows * self._rows_of_token
        self._exchange.most_rows = rows if work.fixed and rows <= FIXED_ROWS else 0
        self._exchange.watch.take()
        out = self._run(work, x_TD)
        took_s, exchange_s = time.perf_counter() - began_s, self._exchange.watch.take()
        return out, Spent(took_s - exchange_s, exchange_s)

    @torch.inference_mode()
    def _run(self, work: Work, x_TD: Tensor | None) -> Tensor:
        weights = self._versions[work.version]
        if self._cache is not None:
            self._cache.copy(work.copies)
        if weights.model is None or not work.token_ids:
            for layer, experts in weights.experts.items():
                if travels(self.parts, layer, self.spec.experts_in_layer(layer)):
                    straight(self._answer_others(self._dispatchers[layer], experts))
            return torch.empty(0, self.spec.d_model, dtype=self.dtype, device=self.device)
        assert self._cache is not None
        hidden_TD = hidden_states(
            weights.model, self._cache, work.spans, work.num_decoding, work.token_ids, x_TD
        )
        if not self.is_last:
            return hidden_TD
        return scores(weights.model, output_rows(hidden_TD, work.spans))

    def _answer_others(self, dispatcher: Dispatcher, experts: Experts) -> Pausing[None]:
        none_TD = torch.empty(0, self.spec.d_model, dtype=self.dtype, device=self.device)
        sent = yield from dispatcher.dispatch(none_TD, _no_rows(self.device))
        rows_RD = experts(sent.rows_RD, sent.rows_per_expert)
        yield from dispatcher.combine(rows_RD, sent)

    def _dispatcher(self, layer: int) -> Dispatcher:
        count = self.spec.experts_in_layer(layer)
        mine = self.part.experts_in(layer)
        if not travels(self.parts, layer, count):
            return CountedDispatcher(LocalDispatcher(), self.load_of[layer], mine)
        place = stage_ranks(self.parts)[self.part.stage].index(self.rank)
        places = held(self.parts, layer, count)
        placed = PlacedDispatcher(self._exchange, places, count, place, self.device)
        return CountedDispatcher(placed, self.load_of[layer], mine)

    def _attach(self, weights: Weights) -> None:
        """Point a version's layers at the groups of now."""
        model = weights.model
        if model is None or not self._dispatchers:
            return
        for layer, dispatcher in self._dispatchers.items():
            ffn = model.get_submodule(f"layers.{layer}.ffn")
            assert isinstance(ffn, MoE)
            ffn.dispatcher = dispatcher
        if self._slices is not None:
            for module in model.modules():
                if hasattr(module, "slices"):
                    setattr(module, "slices", self._slices)  # noqa: B010  no parameter


def most_rows_of_token(spec: ModelSpec, parts: Sequence[Part]) -> int:
    """Rows that one token can send to one rank."""
    held = max((len(part.experts_in(layer)) for part in parts for layer in part.layers), default=1)
    most = held if spec.router.kind == "expert_choice" else spec.router.choices
    return max(1, min(held, most))


def _no_rows(device: torch.device) -> Routing:
    none = torch.empty(0, dtype=torch.long, device=device)
    return Routing(none, none, none.float(), 0, {}, partial(Statistics.zero, 0))
