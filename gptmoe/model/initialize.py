"""Initial weights, a function of (seed, name, expert): every layout starts from the same model."""

import hashlib
import math
import re

import torch
from torch import Tensor

from gptmoe.checkpoint.boxes import Box

from .spec import ModelSpec
from .transformer import GPT

_OUTPUTS = (".attention.out", ".ffn.down", ".shared.down")
_RESIDUAL_OUT = re.compile(r"\.residual\.\d+\.down$")


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Fill all parameters of a whole model in place."""
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        parameter.copy_(initial_values(name, shape, model.spec, seed, Box.whole(shape)))


def initial_values(
    name: str, shape: tuple[int, ...], spec: ModelSpec, seed: int, box: Box
) -> Tensor:
    """A box of the initial values of the parameter `name`, whose whole shape is `shape`.

    N(0, init_std), residual outputs divided by sqrt(2 * layers) (Radford et al. 2019, section 2.3),
    norms at one, biases at zero, and so the last linear layers of an Expert Residual, which begins
    as the identity. Each expert is drawn for itself, everything else whole.
    """
    owner, _, kind = name.rpartition(".")
    if kind.endswith("bias") or _RESIDUAL_OUT.search(owner):
        return torch.zeros(box.shape)
    if "norm" in owner.rpartition(".")[2]:
        return torch.ones(box.shape)
    std, residual_std = spec.init_std, spec.init_std / math.sqrt(2 * spec.num_layers)
    if owner.endswith(".experts"):
        std = residual_std if kind.startswith("down") else std
        inside = Box(box.start[1:], box.shape[1:]).slices(Box.whole(shape[1:]))
        experts = range(box.start[0], box.stop[0])
        drawn = [_normal(shape[1:], std, f"{seed}/{name}/{expert}")[inside] for expert in experts]
        return torch.stack(drawn)
    std = residual_std if owner.endswith(_OUTPUTS) else std
    return _normal(shape, std, f"{seed}/{name}")[box.slices(Box.whole(shape))]


def _normal(shape: tuple[int, ...], std: float, key: str) -> Tensor:
    """Gaussian values drawn on the CPU, so that no device draws others."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    generator = torch.Generator().manual_seed(number)
    return torch.empty(shape).normal_(0, std, generator=generator)
