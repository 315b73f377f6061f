"""What all tests share: the folder of a test says its tier, and how many threads torch may use."""

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")

# Kernels for GPUs run here by Triton's interpreter. Read when triton is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

TESTS = Path(__file__).parent
TIERS = ("ranks", "ray", "faults", "matrix", "gpu", "bench")
"""Folders that are a tier of their own. Files beside them are static, other folders unit tests."""


def tier_of(path: Path) -> str:
    """The tier of a test file, from its place under tests/."""
    if path.parent == TESTS:
        return "static"
    folder = path.relative_to(TESTS).parts[0]
    return folder if folder in TIERS else "unit"


def pytest_configure() -> None:
    """Let Ctrl-C and a lost terminal reach the processes that tests start.

    A shell that starts us with `&` or nohup has its children ignore SIGINT or SIGHUP, and they hand
    that on to theirs.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(tier_of(item.path))


def pytest_collection_finish(session: pytest.Session) -> None:
    """One thread: processes whose threads outnumber the cores run tens of times slower."""
    torch = sys.modules.get("torch")
    benches = any(item.get_closest_marker("bench") for item in session.items)
    if torch is not None and not benches:
        torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not sys.modules["torch"].cuda.is_available():
        pytest.skip("needs a CUDA device")
