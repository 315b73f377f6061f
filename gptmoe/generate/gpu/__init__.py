"""Generation on a GPU: see README.md of the folder above.

Its kernels are written in Triton, which comes with torch for CUDA and is imported nowhere else.
"""

import importlib
from typing import TYPE_CHECKING

from gptmoe.errors import ConfigError

if TYPE_CHECKING:
    from gptmoe.generate.executor import MakeExecutor
    from gptmoe.model.transformer import GPT


def executors(network: "GPT", *, invariant: bool = False) -> "MakeExecutor":
    """Prepare a network on a GPU, in place: what makes executors for it.

    With `invariant` a row's bits depend on no other row, as on a CPU always. Raises
    ConfigError without Triton, or for a model that cannot be.
    """
    try:
        module = importlib.import_module("gptmoe.generate.gpu.executor")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ConfigError(
            "device=cuda wants Triton, which comes with torch for CUDA on Linux; install that "
            "torch, or use device=cpu"
        ) from None
    made: MakeExecutor = module.executors(network, invariant=invariant)
    return made
