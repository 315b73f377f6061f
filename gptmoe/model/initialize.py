"""Initial weights, a function of (seed, name, expert): every layout starts from the same model."""

import hashlib
import math

import torch
from torch import Tensor

from .experts import Experts
from .transformer import GPT


def initialize(model: GPT, seed: int) -> None:
    """Fill all parameters in place: N(0, init_std), residual outputs divided by sqrt(2 * layers)
    (Radford et al. 2019, section 2.3), norms at one, biases at zero."""
    std = model.spec.init_std
    residual_std = std / math.sqrt(2 * model.spec.num_layers)
    experts = {
        f"{name}.": module for name, module in model.named_modules() if isinstance(module, Experts)
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner, _, kind = name.rpartition(".")
            if kind.endswith("bias"):
                parameter.zero_()
            elif "norm" in owner.rpartition(".")[2]:
                parameter.fill_(1.0)
            elif f"{owner}." in experts:
                first = experts[f"{owner}."].first
                expert_std = residual_std if kind.startswith("down") else std
                for index in range(len(parameter)):
                    _normal(parameter[index], expert_std, f"{seed}/{name}/{first + index}")
            else:
                residual = owner.endswith((".attention.out", ".ffn.down"))
                _normal(parameter, residual_std if residual else std, f"{seed}/{name}")


def _normal(tensor: Tensor, std: float, key: str) -> None:
    """Gaussian values drawn on the CPU, so that no device draws others."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    generator = torch.Generator().manual_seed(number)
    tensor.copy_(torch.empty(tensor.shape).normal_(0, std, generator=generator))
