"""A router and its experts as part of the program of a layer: see fused.py.

Which experts have rows is found out by the program: one is enough for a number of rows, and each
weight is read once, however many rows want it.

Letters: R rows, E experts, K choices of a row, S = K R copies of rows, one for each choice, D model
width, F feed-forward width, I inputs, O outputs.
"""

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .fused_experts import EnteringExperts
from .kernels.library import Kernels
from .kernels.program import Enters, Lend, Program
from .kernels.row_router import RowRouter
from .kernels.tasks import Each, Gelu, Group, Weigh
from .kernels.workspace import MOST_ROWS, Workspace


class RoutedExperts:
    """What the programs of a layer, for any number of rows, share in one workspace."""

    def __init__(self, router: RowRouter, experts: EnteringExperts, workspace: Workspace) -> None:
        self._router, self._choices = router, router.spec.choices
        d_ff, d_model = len(experts.up_bias[0]), len(experts.down_bias[0])
        copies = MOST_ROWS * self._choices
        self._copy_SD, self._hidden_SF, self._answer_SD = (
            workspace.lend(name, MOST_ROWS, self._choices * width).view(copies, width)
            for name, width in (("copy", d_model), ("hidden", d_ff), ("answer", d_model))
        )
        self._logits_RE = torch.empty(MOST_ROWS, router.num_experts)
        self._weight_S = torch.empty(copies)
        self._expert_S, self._place_S = torch.empty(2, copies, dtype=torch.long)
        self._ends_E = torch.empty(router.num_experts, dtype=torch.long)
        self._chosen = torch.zeros(1 + copies, dtype=torch.long)
        self._kept: list[Tensor] = []

        def lend(num_bytes: int) -> Tensor:
            self._kept.append(workspace.scratch(num_bytes))
            return self._kept[-1]

        self._up, self._down = (
            _Products(experts.compiled, weights, x, out, biases, lend, self._chosen)
            for weights, x, out, biases in (
                (experts.up, self._copy_SD, self._hidden_SF, experts.up_bias),
                (experts.down, self._hidden_SF, self._answer_SD, experts.down_bias),
            )
        )

    def enter(self, program: Program, x_RD: Tensor, out_RD: Tensor) -> None:
        """Add what computes the weighted sums of the experts' answers to x; both lie densely."""
        rows, width = x_RD.shape
        copies = rows * self._choices
        logits_RE, expert_S, weight_S = (
            self._logits_RE[:rows], self._expert_S[:copies], self._weight_S[:copies],
        )  # fmt: skip
        program.add("scores", self._router.weight.task(x_RD, logits_RE))
        program.add("choose", self._router.task(logits_RE, expert_S, weight_S))
        program.add("group", self._group(x_RD))
        self._up.enter(program, copies)
        hidden_SF = self._hidden_SF[:copies]
        program.add("gelu", Gelu(x=hidden_SF.data_ptr(), count=hidden_SF.numel()))
        self._down.enter(program, copies)
        sums = Weigh(
            x=self._answer_SD.data_ptr(),
            place=self._place_S.data_ptr(),
            weight=weight_S.data_ptr(),
            out=out_RD.data_ptr(),
            rows=rows,
            choices=self._choices,
            width=width,
        )
        program.add("weigh", sums)

    def rows(self) -> Iterator[tuple[int, int]]:
        """The experts that had rows when a program ran last, and how many."""
        count, *experts = self._chosen.tolist()
        return ((expert, self._up.rows(expert)) for expert in experts[:count])

    def _group(self, x_RD: Tensor) -> Group:
        rows, width = x_RD.shape
        return Group(
            expert=self._expert_S.data_ptr(),
            x=x_RD.data_ptr(),
            out=self._copy_SD.data_ptr(),
            place=self._place_S.data_ptr(),
            chosen=self._chosen.data_ptr(),
            ends=self._ends_E.data_ptr(),
            up=ctypes.addressof(self._up.each),
            down=ctypes.addressof(self._down.each),
            rows=rows,
            experts=self._router.num_experts,
            choices=self._choices,
            width=width,
        )


class _Products:
    """The product of each expert, for those that have rows."""

    def __init__(
        self,
        compiled: Kernels,
        weights: Sequence[Enters],
        x_SI: Tensor,
        out_SO: Tensor,
        biases: Sequence[Tensor],
        lend: Lend,
        chosen: Tensor,
    ) -> None:
        calls = [
            weight.calls(x_SI, out_SO, bias_O, lend)
            for weight, bias_O in zip(weights, biases, strict=True)
        ]
        self._before = calls[0][:-1]
        (kernel,) = {call[-1][0] for call in calls}
        kind: Any = type(calls[0][-1][1])
        self._tasks = (kind * len(calls))(*(call[-1][1] for call in calls))
        self.each = Each(
            kernel=compiled.addresses[kernel],
            tasks=ctypes.addressof(self._tasks),
            size=ctypes.sizeof(kind),
            chosen=chosen.data_ptr(),
        )

    def enter(self, program: Program, copies: int) -> None:
        """Add it for so many rows in all."""
        for kernel, task in self._before:
            own = type(task).from_buffer_copy(task)
            own.end = copies
            program.add(kernel, own)
        program.add("each", self.each)

    def rows(self, expert: int) -> int:
        """How many it had."""
        task = self._tasks[expert]
        return int(task.end - task.first)
