"""The updater that a config asks for. Apart from assemble.py, since DeepSpeed comes with it."""

from gptmoe.model.transformer import GPT
from gptmoe.parallel.mesh import Mesh
from gptmoe.parallel.updater import PlainUpdater, Updater

from .config import TrainConfig
from .zero import ZeroUpdater


def make_updater(model: GPT, mesh: Mesh, config: TrainConfig) -> Updater:
    """The updater that parallel.zero names."""
    if config.parallel.zero in (1, 2):
        return ZeroUpdater(model, mesh, config.optimizer, config.parallel.zero)
    return PlainUpdater(model, mesh, config.optimizer)
