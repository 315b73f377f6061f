"""Runs compiled kernels on the threads of torch's own pool: a second pool would fight with it."""

import ctypes
import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled kernels (kernels.py) and what starts them."""

    compiled: Any
    start: Callable[[int, int, int, int], None]

    def run(self, kernel: int, task: Sequence[int], counter: int) -> None:
        """Call the kernel at an address on all threads; the field `counter` of the task is theirs
        to count with."""
        fields = np.array((*task, 0), np.int64)
        address = fields.ctypes.data
        fields[counter] = address + fields.itemsize * len(task)
        self.start(kernel, address, torch.get_num_threads(), 0)


@functools.cache
def kernels() -> Kernels | None:
    """None without numba, or where torch brings no GNU OpenMP along."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    try:
        compiled = importlib.import_module("gptmoe.generate.kernels")
        start = ctypes.CDLL(str(libraries[0])).GOMP_parallel
    except (ImportError, IndexError, OSError, AttributeError) as error:
        log.debug("no compiled kernels: %s", error)
        return None
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return Kernels(compiled, start)
