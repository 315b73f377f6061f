"""What runs on a bare machine with a GPU needs no package but those that its image has."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = "ray", "deepspeed", "jieba", "grpc", "fastapi", "pydantic", "typer", "tensorboard"


@pytest.mark.parametrize(
    "module",
    ["tests.bench.gpu.bench_latency", "tests.gpu.test_generation", "tests.gpu.test_one_gpu"],
)
def test_the_parts_for_gpus_do_without_most_packages(module: str) -> None:
    blocked = f"import sys; sys.modules |= dict.fromkeys({ABSENT}); import {module}"
    done = subprocess.run(
        [sys.executable, "-c", blocked], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
