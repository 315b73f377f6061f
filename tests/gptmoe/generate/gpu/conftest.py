"""The kernels for GPUs run on this machine by Triton's interpreter (see tests/conftest.py)."""

import pytest

pytest.importorskip("triton", reason="the kernels for GPUs are written in Triton")
