"""Kernels that run one after the other as one call: no Python lies between them."""

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from .library import Kernels
from .tasks import Attention, Call, Calls, ProductTask, Task
from .workspace import Workspace

Lend = Callable[[int], Tensor]
"""Asked for so many bytes of memory for the time in which a program runs."""
ProductCall = tuple[str, ProductTask]
"""A kernel of a product, and what it is told."""


class Program:
    """Calls of kernels in order, each on all threads. Tasks may be changed between two runs."""

    def __init__(self, compiled: Kernels, workspace: Workspace | None = None) -> None:
        """`workspace` lends what its kernels need besides; default: one of its own."""
        self._compiled, self._workspace = compiled, workspace
        self._tasks: list[Task] = []
        self._kept: list[Tensor] = []
        self._calls: list[Call] = []
        self._all: tuple[Calls, Any] | None = None

    def add(self, kernel: str, task: Task) -> None:
        """Call this kernel next. The memory that the task names stays its owner's."""
        counters = 3 if isinstance(task, Attention) else 1
        address = self._compiled.addresses[kernel]
        self._tasks.append(task)
        self._calls.append(Call(address, ctypes.addressof(task), counters))
        self._all = None

    def add_product(self, weight: "Enters", x: Tensor, out: Tensor, bias_O: Tensor) -> None:
        """Compute out = x W^T + b next; see Enters.calls."""
        for kernel, task in weight.calls(x, out, bias_O, self.scratch):
            self.add(kernel, task)

    def extend(self, other: "Program") -> None:
        """Go on with the calls of another program."""
        self._tasks += other._tasks
        self._kept += other._kept
        self._calls += other._calls
        self._all = None

    def keep(self, *memory: Tensor) -> None:
        """Own memory that tasks name."""
        self._kept += memory

    def scratch(self, num_bytes: int) -> Tensor:
        """Memory for the kernels that are added next; others use it before and after them."""
        if self._workspace is None:
            self._workspace = Workspace()
        self._kept.append(self._workspace.scratch(num_bytes))
        return self._kept[-1]

    def run(self) -> None:
        """Run all calls."""
        if self._all is None:
            calls = (Call * len(self._calls))(*self._calls)
            self._all = Calls(*self._compiled.pool, ctypes.addressof(calls), len(calls)), calls
        self._compiled.run_program(self._all[0])


class Enters(Protocol):
    """A weight whose products can be part of a program, up to a number of rows."""

    @property
    def most_rows(self) -> int:
        """Of a product."""
        ...

    def calls(self, x: Tensor, out: Tensor, bias_O: Tensor, lend: Lend) -> list[ProductCall]:
        """What computes out = x W^T + b for the rows of x [R, I] and out [R, O], which lie densely.

        The last is the product. Those before it prepare x, in the same way for all weights of this
        form and shape.
        """
        ...
