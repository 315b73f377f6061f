"""Weights in 8 or 4 bits, products in the compute type: a token reads a half or a quarter of them.

Symmetric, without calibration, from the stored weights:

  int8  w = scale_o * q, q in -127..127; one scale for each output.
  int4  w = scale_og * q, q in -8..7; one scale for each output and group of 64 (or 32) inputs. It
        puts the largest weight of the group, with its sign, on -8: then all 16 values are used (as
        in llama.cpp's Q4_0).

Embeddings, norms, routers, mixes and biases stay as they are. The kernels for these products (in
bfloat16 our own, else torch's) give a row the same bits among any number of rows and on
any number of threads: no padding.

Letters: R rows, I in, O out, G groups of inputs.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptmoe.errors import ConfigError
from gptmoe.model.layers import Linear
from gptmoe.model.moe import MoE
from gptmoe.model.residual_moe import Mix
from gptmoe.model.routing import LinearRouter
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT

from .fused_network import fuse
from .kernels.few_bits import FewBits, few_bits
from .kernels.rows import gelu_
from .packed import SeparateExperts, pack_router, served_bias
from .packed_weight import can_pack

Weights = Literal["", "int8", "int4"]
"""How the weights of products are held; empty: in the type that computes."""

GROUPS = (64, 32)
"""Inputs that share a scale in int4: the first of these that divides their number."""
TILE = 16
"""The int4 kernel computes so many outputs at once: weights are padded to multiples of it."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight [O, I] in 8 bits (group 0) or in 4, as torch's kernels read it."""

    values: Tensor
    """int8 [O, I], or uint8 [O', I / 2] with two values a byte, O' the padded number of outputs."""
    scales: Tensor
    """[O], or [G, O', 2] with the zero point 0 behind each scale."""
    outputs: int
    group: int = 0

    @property
    def num_bytes(self) -> int:
        """What a product with it reads."""
        return self.values.nbytes + self.scales.nbytes

    def product(self, x: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x W^T + b in the type of x; x has any leading dimensions."""
        x_RI = x.reshape(-1, x.shape[-1]).contiguous()
        if self.group:
            y_RO = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x_RI, self.values, self.group, self.scales
            )[:, : self.outputs]
        else:
            y_RO = torch.ops.aten._weight_int8pack_mm(x_RI, self.values, self.scales)
        if bias_O is not None:
            y_RO = y_RO.add_(bias_O)
        return y_RO if x.dim() == 2 else y_RO.view(*x.shape[:-1], self.outputs)


Held = Quantized | FewBits
"""A weight in the form that the fastest kernel for it reads."""


def quantized(weight_OI: Tensor, weights: Weights, dtype: torch.dtype) -> Held:
    """Round a weight to the nearest; its scales are kept in `dtype`, that of the products."""
    weight_OI = weight_OI.detach().float()
    return _int8(weight_OI, dtype) if weights == "int8" else _int4(weight_OI, dtype)


def quantize(network: GPT, weights: Weights) -> None:
    """Hold the weights of linear layers, experts and head in int8 or int4, in place.

    Each plain weight is given up as it is rounded; the token table stays for its rows. Raises
    ConfigError where that cannot be.
    """
    dtype, device = network.compute_dtype, network.embed.tokens.weight.device
    check(network.spec, weights, dtype, device)
    make = partial(quantized, weights=weights, dtype=dtype)
    network.head = make(network.embed.tokens.weight).product
    for name, module in list(network.named_modules()):
        if isinstance(module, Linear):
            bias_O = served_bias(module.bias, dtype)
            network.set_submodule(name, QuantizedLinear(make(module.weight), bias_O))
        elif isinstance(module, (LinearRouter, Mix)):
            pack_router(module)
        elif isinstance(module, MoE):
            module.experts = QuantizedExperts(module.experts, make, dtype)
    network.fixed_rows = False
    fuse(network)


def check(spec: ModelSpec, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ConfigError unless there are kernels for such a model."""
    if device.type != "cpu" or not can_pack(dtype, device):
        raise ConfigError(
            f'weights="{weights}" computes in float32 or bfloat16 on a CPU with oneDNN, not in '
            f'{str(dtype).removeprefix("torch.")} on {device.type} here; use weights=""'
        )
    for name in ("d_model", "d_ff"):
        if getattr(spec, name) % GROUPS[-1]:
            raise ConfigError(
                f'weights="{weights}" needs widths that {GROUPS[-1]} divides, but model.{name} is '
                f'{getattr(spec, name)}; use weights=""'
            )


class QuantizedLinear(nn.Module):
    """y = x W^T + b; see model.layers.Linear."""

    def __init__(self, weight: Held, bias_O: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias_O

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        return _linear(x, self.weight, self.bias, gelu=gelu)


class QuantizedExperts(SeparateExperts[Held]):
    """Experts with quantized weights."""

    def _product(self, x: Tensor, weight: Held, bias: Tensor, *, gelu: bool = False) -> Tensor:
        return _linear(x, weight, bias, gelu=gelu)


def _linear(x: Tensor, weight: Held, bias_O: Tensor, *, gelu: bool) -> Tensor:
    y = weight.product(x, bias_O)
    return gelu_(y) if gelu else y


def _int8(weight_OI: Tensor, dtype: torch.dtype) -> Held:
    scale_O = (weight_OI.abs().amax(1) / 127).to(dtype)
    value_OI = _divided(weight_OI, scale_O.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    own = few_bits(value_OI, scale_O.unsqueeze(1), 8) if dtype == torch.bfloat16 else None
    return own or Quantized(value_OI, scale_O, len(weight_OI))


def _int4(weight_OI: Tensor, dtype: torch.dtype) -> Held:
    outputs, inputs = weight_OI.shape
    group = next(size for size in GROUPS if inputs % size == 0)
    weight_OGI = weight_OI.unflatten(1, (-1, group))
    largest_OG1 = weight_OGI.gather(2, weight_OGI.abs().argmax(2, keepdim=True))
    scale_OG = (largest_OG1.squeeze(2) / -8).to(dtype)
    value_OGI = _divided(weight_OGI, scale_OG.unsqueeze(2)).round_().clamp_(-8, 7)
    own = few_bits(value_OGI.flatten(1), scale_OG, 4) if dtype == torch.bfloat16 else None
    if own is not None:
        return own
    missing = -outputs % TILE
    value_OI = F.pad(value_OGI.flatten(1).add_(8).int(), (0, 0, 0, missing), value=8)
    values = torch.ops.aten._convert_weight_to_int4pack_for_cpu(value_OI, 1)
    scale_GO = F.pad(scale_OG, (0, 0, 0, missing)).t()
    scales = torch.stack((scale_GO, torch.zeros_like(scale_GO)), -1)
    return Quantized(values, scales, outputs, group)


def _divided(weight: Tensor, scale: Tensor) -> Tensor:
    """weight / scale, 0 where both are 0."""
    return (weight / scale.float()).nan_to_num_(0.0, 0.0, 0.0)
