"""Products of one or two rows with a packed weight, at the speed at which memory is read.

oneDNN's kernels reach about two thirds of it with so few rows, which is what decoding asks for.
This kernel reads the same packed memory and gives the same bits: each weight is tried when it is
packed, and where one bit differs (another machine, another layout) oneDNN computes it as before.

Letters: R rows, I inputs, O outputs.
"""

import ctypes
import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MOST_ROWS = 2
CHUNKS = (512, 1024)
"""Inputs that oneDNN sums up by themselves; it takes longer chunks for longer sums."""

log = logging.getLogger(__name__)

Product = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class FewRows:
    """A packed bfloat16 weight [O, I] for products of few rows."""

    values: Tensor
    """Packed; owns the memory."""
    outputs: int
    inputs: int
    chunk: int

    def product(self, x_RI: Tensor, bias_O: Tensor | None) -> Tensor:
        """x W^T + b, [R, O]; bfloat16, contiguous."""
        kernel = _kernel()
        assert kernel is not None
        out_RO = x_RI.new_empty(len(x_RI), self.outputs)
        task = np.array(
            (
                torch.ops.mkldnn.data_ptr(self.values),
                x_RI.data_ptr(),
                0 if bias_O is None else bias_O.data_ptr(),
                out_RO.data_ptr(),
                0,
                -(-self.outputs // kernel.lanes),
                self.inputs // 2,
                self.chunk // 2,
                self.outputs,
                len(x_RI),
                0,
            ),
            np.int64,
        )
        address = task.ctypes.data
        task[kernel.counter] = address + 8 * (len(task) - 1)
        kernel.on_threads(kernel.address, address, torch.get_num_threads(), 0)
        return out_RO


def few_rows(values: Tensor, shape: Sequence[int], packed_product: Product) -> FewRows | None:
    """The kernel for a packed weight, or None if it would not give `packed_product`'s bits."""
    kernel, (outputs, inputs) = _kernel(), shape
    if kernel is None or values.dtype != torch.bfloat16 or inputs % 2:
        return None
    padded = outputs + -outputs % kernel.lanes
    if torch.ops.mkldnn._nbytes(values) != padded * inputs * values.dtype.itemsize:
        return None
    numbers = torch.Generator().manual_seed(inputs)
    x_RI = torch.randn(MOST_ROWS, inputs, generator=numbers).bfloat16()
    # Results that nearly cancel against the bias show the last bits of the sums before it.
    bias_O = -packed_product(x_RI, None)[0]
    expected_RO = packed_product(x_RI, bias_O)
    for chunk in sorted(CHUNKS, reverse=inputs > CHUNKS[-1]):
        found = FewRows(values, outputs, inputs, chunk)
        if torch.equal(found.product(x_RI, bias_O), expected_RO):
            return found
    log.debug("no kernel for few rows with the bits of oneDNN for [%d, %d]", outputs, inputs)
    return None


@dataclass(frozen=True, slots=True)
class _Kernel:
    address: int
    lanes: int
    counter: int
    """The place in a task of the address of the next block's number."""
    on_threads: Callable[[int, int, int, int], None]
    """Runs a function on the threads of torch's own pool: a second pool would fight with it."""


@functools.cache
def _kernel() -> _Kernel | None:
    """None without numba, or where torch brings no GNU OpenMP along."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    try:
        compiled = importlib.import_module("gptmoe.generate.few_rows_kernel")
        run = ctypes.CDLL(str(libraries[0])).GOMP_parallel
    except (ImportError, IndexError, OSError, AttributeError) as error:
        log.debug("no kernel for products of few rows: %s", error)
        return None
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    run.restype = None
    fields = compiled.FIELDS
    return _Kernel(compiled.work.address, compiled.LANES, fields.index("next"), run)
