"""The files of C as a library: built by the machine's compiler at first use, on torch's threads."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .tasks import Calls, Task

SOURCES = Path(__file__).parent
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-Wno-psabi",
)
COMPILE_WITHIN_S = 120.0
KERNELS = (
    "product",
    "wide_product",
    "plain_product",
    "halve",
    "product8",
    "product4",
    "scores",
    "choose",
    "group",
    "each",
    "weigh",
    "store",
    "attend",
    "norm",
    "gelu",
    "wide_gelu",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The library's functions, and what calls one on all threads of torch's pool: a second pool
    would fight with it."""

    addresses: Mapping[str, int]
    """By name; one is missing where the processor has not got its instructions."""
    start: Callable[[int, object, int, int], None]
    """The pool's own function."""
    start_program: Callable[[object, int], None]
    pool: tuple[int, int]
    """Where the pool's functions lie: to start, and to wait for each other."""

    def run(self, name: str, task: Task, most_threads: int = 2**31) -> None:
        """Call a kernel."""
        task.next = 0
        threads = min(torch.get_num_threads(), most_threads)
        self.start(self.addresses[name], ctypes.byref(task), threads, 0)

    def run_program(self, calls: Calls) -> None:
        """Call its kernels one after the other."""
        self.start_program(ctypes.byref(calls), torch.get_num_threads())


@functools.cache
def kernels() -> Kernels | None:
    """None without a C compiler, or where torch brings no GNU OpenMP along: torch then computes."""
    pools = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not pools:
        log.info("torch has no GNU OpenMP here; bfloat16 is decoded by torch's own kernels, slower")
        return None
    try:
        library, pool = ctypes.CDLL(str(built())), ctypes.CDLL(str(pools[0]))
        start, meet = pool.GOMP_parallel, pool.GOMP_barrier
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        log.info("%s; bfloat16 is decoded by torch's own kernels, slower", error)
        return None
    start.restype, library.run_program.restype = None, None
    start.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    library.run_program.argtypes = (ctypes.c_void_p, ctypes.c_uint)
    functions = {name: getattr(library, name) for name in KERNELS if hasattr(library, name)}
    addresses = {name: _address(found) for name, found in functions.items()}
    return Kernels(addresses, start, library.run_program, (_address(start), _address(meet)))


def built(folder: Path = SOURCES / "__pycache__") -> Path:
    """The library for this machine's processor, from `folder` or compiled into it.

    Raises OSError or SubprocessError, with a sentence, if that cannot be.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise OSError("no C compiler (cc) is installed")
    library = folder / f"kernels-{_digest(compiler)}.so"
    if library.exists():
        return library
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        library = Path(tempfile.mkdtemp(prefix="gptmoe-kernels-")) / library.name
    library.parent.mkdir(exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    draft = Path(name)
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    command = [compiler, *FLAGS, *sources, "-o", str(draft), "-lm"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMPILE_WITHIN_S, check=False
    )
    if done.returncode:
        draft.unlink()
        raise OSError(f"{compiler} cannot compile the kernels: {done.stderr.strip()[-500:]}")
    draft.replace(library)  # at once: other processes may be looking for it
    return library


def _address(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def _digest(compiler: str) -> str:
    """Of all that the library depends on; instructions differ from processor to processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        processor = platform.processor()
    sources = (path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.[ch]")))
    parts = (*sources, " ".join(FLAGS), compiler, processor)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
