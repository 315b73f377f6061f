"""How much memory this machine, or the container around the process, can still give."""

import ctypes
from contextlib import suppress
from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can be had without swapping; None where the system does not tell (not Linux).

    The page cache counts as available. A container's limit (cgroup v2) counts where it is lower.
    """
    machine = _numbers(root / "proc/meminfo").get("MemAvailable:")
    if machine is None:
        return None
    limit = _first_word(root / "sys/fs/cgroup/memory.max")
    if not limit.isdigit():  # no such file, or "max"
        return machine * 1024
    used = _numbers(root / "sys/fs/cgroup/memory.stat").get("anon", 0)
    return min(machine * 1024, max(0, int(limit) - used))


def give_back() -> None:
    """Return to the system what the allocator keeps of memory that was freed (glibc; else nothing).

    After loading: what was read and rearranged leaves holes that nothing of that size fills again.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _numbers(path: Path) -> dict[str, int]:
    lines = [line.split() for line in _text(path).splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _first_word(path: Path) -> str:
    return (_text(path).split() or [""])[0]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
