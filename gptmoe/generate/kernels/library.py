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
    "plain_product",
    "halve",
    "product8",
    "product4",
    "scores",
    "store",
    "attend",
)

log = logging.getLogger(__name__)

_Address, _Number = ctypes.c_void_p, ctypes.c_int64


class Product(ctypes.Structure):
    """The task of `product`, as in product.c."""

    _fields_ = (
        *((name, _Address) for name in ("weight", "x", "bias", "out")),
        *((name, _Number) for name in ("next", "blocks", "pairs", "chunk", "outputs", "rows")),
    )


class Plain(ctypes.Structure):
    """The task of `plain_product`, as in plain.c."""

    _fields_ = (
        *((name, _Address) for name in ("weight", "x", "bias", "out")),
        *((name, _Number) for name in ("next", "rows", "outputs", "inputs")),
    )


class FewBitsTask(ctypes.Structure):
    """The task of `halve`, `product8` and `product4`, as in few_bits.c."""

    _fields_ = (
        *((name, _Address) for name in ("weight", "scale", "x", "low", "high", "sums", "unit")),
        *((name, _Address) for name in ("bias", "out")),
        *((name, _Number) for name in ("next", "blocks", "quads", "group", "outputs", "rows")),
    )


class Scores(ctypes.Structure):
    """The task of `scores`, as in scores.c."""

    _fields_ = (
        *((name, _Address) for name in ("weight", "x", "out")),
        *((name, _Number) for name in ("next", "rows", "outputs", "inputs")),
    )


class Attention(ctypes.Structure):
    """The task of `store` and `attend`, as in attention.c."""

    _fields_ = (
        *((name, _Address) for name in ("q", "keys", "values", "out", "places", "segments")),
        ("scratch", _Address),
        *((name, _Number) for name in ("next", "threads", "layer", "rows", "heads", "width")),
        *((name, _Number) for name in ("stride", "num_segments", "slots", "most_keys")),
    )


Task = Product | Plain | FewBitsTask | Scores | Attention


@dataclass(frozen=True, slots=True)
class Kernels:
    """The library's functions, and what calls one on all threads."""

    addresses: Mapping[str, int]
    """By name; one is missing where the processor has not got its instructions."""
    start: Callable[[int, object, int, int], None]

    def run(self, name: str, task: Task, most_threads: int = 2**31) -> None:
        """Call a kernel on the threads of torch's pool: a second pool would fight with it."""
        task.next = 0
        threads = min(torch.get_num_threads(), most_threads)
        self.start(self.addresses[name], ctypes.byref(task), threads, 0)


@functools.cache
def kernels() -> Kernels | None:
    """None without a C compiler, or where torch brings no GNU OpenMP along: torch then computes."""
    pools = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not pools:
        log.info("torch has no GNU OpenMP here; bfloat16 is decoded by torch's own kernels, slower")
        return None
    try:
        library = ctypes.CDLL(str(built()))
        start = ctypes.CDLL(str(pools[0])).GOMP_parallel
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        log.info("%s; bfloat16 is decoded by torch's own kernels, slower", error)
        return None
    start.restype = None
    start.argtypes = (_Address, _Address, ctypes.c_uint, ctypes.c_uint)
    functions = {name: getattr(library, name) for name in KERNELS if hasattr(library, name)}
    addresses = {name: ctypes.cast(found, _Address).value for name, found in functions.items()}
    return Kernels({name: address for name, address in addresses.items() if address}, start)


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
    draft = library.with_suffix(f".{os.getpid()}")
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    command = [compiler, *FLAGS, *sources, "-o", str(draft), "-lm"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMPILE_WITHIN_S, check=False
    )
    if done.returncode:
        raise OSError(f"{compiler} cannot compile the kernels: {done.stderr.strip()[-500:]}")
    draft.replace(library)  # at once: other processes may be looking for it
    return library


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
