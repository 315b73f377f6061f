"""Computes what a step plan says, on a GPU: paged cache, captured decoding steps.

Letters: R rows (tokens of the step), D model width, S sampled rows, V vocabulary.
"""

from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from gptmoe.generate.executor import MakeExecutor, output_rows, scores, tokens_of
from gptmoe.generate.plan import SlotSpan, Span, StepPlan
from gptmoe.generate.versions import Versions
from gptmoe.model.transformer import GPT

from .attention import PagedAttend
from .cache import PagedCache
from .graphs import DecodingGraphs
from .memory import full
from .products import can_be_captured, prepare, routed


class PagedExecutor:
    """The whole model and its KV cache on one device; a `WholeModel`.

    The network has been prepared (products.py). With `invariant` a row's bits depend on no other
    row: prompts go through the kernel of decoding rows too. Decoding steps are captured as graphs
    where the device has them.
    """

    banks = 1

    def __init__(self, model: GPT, slots: int, blocks: int, *, invariant: bool = False) -> None:
        self.model = model.eval()
        self.invariant = invariant
        self.device = model.embed.tokens.weight.device
        self.cache = PagedCache(model.spec, slots, blocks, model.compute_dtype, self.device)
        self._slots = slots
        self._models = Versions[GPT]()
        self._graphs = Versions[DecodingGraphs]()
        self._is_warm = False
        self.add(0, model)

    def add(self, version: int, model: GPT) -> None:
        """See WholeModel.add."""
        if self.device.type == "cuda" and can_be_captured(model):
            graphs = DecodingGraphs(model, self.cache, self._slots)
            if self._is_warm:
                self._capture(graphs)
            self._graphs.add(version, graphs)
        self._models.add(version, model.eval())

    def held(self) -> Set[int]:
        """See WholeModel.held."""
        return self._models.held.keys()

    def warm_up(self) -> None:
        """See WholeModel.warm_up. Raises ConfigError if there is not enough memory."""
        self._is_warm = True
        for graphs in self._graphs.held.values():
            self._capture(graphs)

    def _capture(self, graphs: DecodingGraphs) -> None:
        with self._here(), full("the captured decoding steps", self.device):
            graphs.capture()

    def keep(self, versions: Set[int]) -> None:
        """See Executor.keep."""
        self._models.keep(versions)
        self._graphs.keep(versions)

    def forget_graphs(self) -> None:
        """Compute decoding steps uncaptured from now on: to compare, or to look for a fault."""
        self._graphs = Versions()

    def run(self, plan: StepPlan, tokens: Mapping[str, Sequence[int]]) -> Tensor:
        """See Executor.run. The scores come back to the CPU, where tokens are chosen."""
        self.model = self._models.held[plan.version]
        self.cache.begin(plan.copies, plan.trims, plan.spans)
        row_3R = rows_of(plan.spans, tokens_of(plan.spans, tokens))
        graphs = self._graphs.held.get(plan.version)
        if graphs is not None and plan.num_decoding == len(plan.spans):
            with self._here():
                return graphs.run(row_3R).cpu()
        hidden_RD = self._compute(row_3R, plan.spans, plan.num_decoding)
        return self.logits(output_rows(hidden_RD, plan.spans)).cpu()

    def hidden(
        self, spans: Sequence[Span], num_decoding: int, tokens: Mapping[str, Sequence[int]]
    ) -> Tensor:
        """See WholeModel.hidden."""
        self.cache.begin((), (), spans)
        return self._compute(rows_of(spans, tokens_of(spans, tokens)), spans, num_decoding)

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """See WholeModel.logits."""
        with self._here():
            return scores(self.model, hidden_SD)

    @torch.inference_mode()
    def _compute(self, row_3R: Tensor, spans: Sequence[SlotSpan], num_decoding: int) -> Tensor:
        row_3R = row_3R.to(self.device)
        for layer in routed(self.model):
            layer.live_T = None
        chunks = () if self.invariant else spans[num_decoding:]
        attend = PagedAttend(self.cache, row_3R[2], row_3R[1], chunks)
        with self._here():
            output = self.model(row_3R[:1], row_3R[1:2], attend=attend)
        return output.hidden_BTD[0]

    def _here(self) -> AbstractContextManager[object]:
        """Kernels of Triton start on the current device, wherever their tensors are."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def executors(network: GPT, *, invariant: bool = False) -> MakeExecutor:
    """See the package's function of this name, which imports this one."""
    prepare(network, invariant=invariant)
    return partial(PagedExecutor, invariant=invariant)


def rows_of(spans: Sequence[SlotSpan], token_ids: Sequence[int]) -> Tensor:
    """Token, position and slot of each row of a step, [3, R] int64 on the CPU."""
    places = [(place, s.slot) for s in spans for place in range(s.start, s.start + s.count)]
    return torch.tensor([token_ids, *zip(*places, strict=True)], dtype=torch.int64)
