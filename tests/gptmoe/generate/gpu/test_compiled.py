"""The kernels compile for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")
ROOT = Path(__file__).parents[4]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings its assembler for Linux")
@pytest.mark.parametrize(("capability", "dtype"), [("80", "bf16"), ("90", "bf16"), ("90", "fp32")])
def test_for_gpus(tmp_path: Path, capability: str, dtype: str) -> None:
    """A100, H100. In bf16 tiles are multiplied by one kind of instruction, whatever the device:
    then a row's bits do not depend on its tile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, SCRIPT, capability, dtype],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {fact.pop("name"): fact for fact in map(json.loads, done.stdout.splitlines())}
    assert set(found) == {
        "store", "attend_part", "merge_parts", "product", "expert_product", "norm"
    }  # fmt: skip
    for name in ("product", "expert_product"):
        assert (found[name]["mma.sync"] > 0) == (dtype == "bf16")
    assert not any(fact["wgmma.mma_async"] for fact in found.values())
