"""Small networks whose layers are programs, and their decoding steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gptmoe.generate.cache import KVCache
from gptmoe.generate.fused import FusedBlock
from gptmoe.generate.kernels.library import kernels
from gptmoe.generate.kernels.row_attention import RowAttend
from gptmoe.generate.packed import SeparateExperts, pack
from gptmoe.generate.plan import Span
from gptmoe.generate.quantized import quantize
from gptmoe.model.initialize import initialize
from gptmoe.model.moe import MoE
from gptmoe.model.spec import ModelSpec, RouterKind, RouterSpec
from gptmoe.model.transformer import GPT, Block
from gptmoe.stored import KEPT_WIDE
from tests.small_model import draw_biases, settle

CPU = torch.device("cpu")
FORMS: dict[str, Callable[[GPT], Any]] = {
    "packed": pack,
    "mapped": lambda network: pack(network, experts=False),
    "int8": lambda network: quantize(network, "int8"),
    "int4": lambda network: quantize(network, "int4"),
}
each_form = pytest.mark.parametrize("form", FORMS)


def make(
    form: str = "packed",
    *,
    d_model: int = 128,
    d_ff: int = 256,
    experts: tuple[int, ...] = (5, 2),
    kind: RouterKind = "switch",
    residual_moe: bool = False,
) -> GPT:
    """Four layers; experts on the second and the fourth, () = none."""
    spec = ModelSpec(
        num_layers=4,
        d_model=d_model,
        num_heads=d_model // 64,
        d_ff=d_ff,
        vocab_size=96,
        max_seq_len=256,
        num_experts=experts,
        init_std=0.2,
        router=RouterSpec(kind=kind),
        residual_moe=residual_moe,
    )
    network = GPT(spec, compute_dtype=torch.bfloat16)
    initialize(network, seed=1)
    settle(network)
    draw_biases(network)
    for name, parameter in network.named_parameters():
        if not any(part in name for part in KEPT_WIDE):
            parameter.data = parameter.data.bfloat16()
    FORMS[form](network.requires_grad_(False))
    return network.eval()


def make_fused(form: str = "packed", **spec: Any) -> GPT:
    """Skips on processors for which we have no kernel of that form."""
    network = make(form, **spec)
    moe = network.layers[1].ffn
    has_programs = isinstance(network.layers[0], FusedBlock)
    if isinstance(moe, MoE):
        assert isinstance(moe.experts, SeparateExperts)
        has_programs &= moe.experts.entering is not None
    if not has_programs:
        pytest.skip("this CPU's weights of that form cannot be part of a program")
    return network


def moe_of(network: GPT, layer: int = 1) -> MoE:
    """The experts of a layer."""
    moe = network.layers[layer].ffn
    assert isinstance(moe, MoE)
    return moe


def taken_apart(network: GPT) -> GPT:
    """The same weights in layers whose kernels are called one by one."""
    for block in network.layers:
        assert isinstance(block, FusedBlock)
        block.__class__ = Block
        if isinstance(block.ffn, MoE):
            assert isinstance(block.ffn.experts, SeparateExperts)
            block.ffn.experts.entering = None
    return network


def spans(slots: int, start: int) -> list[Span]:
    return [Span("", slot, start, 1, outputs=1) for slot in range(slots)]


@torch.inference_mode()
def steps(network: GPT, rows: int, *caches: KVCache, **more: Any) -> Tensor:
    """Hidden states of three decoding steps of so many sequences, [3, R, D]; through all layers, or
    through those of each cache."""
    caches = caches or (KVCache(network.spec, rows, torch.bfloat16, CPU),)
    compiled, found = kernels(), []
    assert compiled is not None
    for position in range(3):
        token_1R = (torch.arange(rows) * 7 + position).view(1, -1) % 96
        position_1R, x_1RD = torch.full((1, rows), position), None
        for cache in caches:
            attend = RowAttend(cache, spans(rows, position), compiled)
            named = {"attend": attend, "layers": cache.layers, "x_BTD": x_1RD, **more}
            x_1RD = network(token_1R, position_1R, **named).hidden_BTD
        assert x_1RD is not None
        found.append(x_1RD[0])
    return torch.stack(found)
