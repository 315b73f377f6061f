"""Make a plain GPT distributed, from outside, in one visible order."""

import torch

from gptmoe.model.experts import Experts
from gptmoe.model.initialize import initialize
from gptmoe.model.moe import MoE
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT

from .expert import AllToAllDispatcher
from .mesh import Mesh


def build(
    spec: ModelSpec,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    seed: int | None = 0,
) -> GPT:
    """This rank's part of the model, with memory only for that part.

    `dtype` is the weights' type, `compute_dtype` the products' (default: the same). `seed` None
    leaves the weights uninitialised, to be read from a checkpoint.
    """
    mesh.layout.check_experts(spec.num_experts)
    with torch.device("meta"):
        model = GPT(spec, compute_dtype or dtype)
    share_experts(model, mesh)
    model = model.to(dtype).to_empty(device=device)
    if seed is not None:
        initialize(model, seed)
    return model


def share_experts(model: GPT, mesh: Mesh) -> None:
    """Keep this rank's slice of each layer's experts and reach the others by all-to-all."""
    if mesh.expert_group is None:
        return
    spec = model.spec
    for layer in spec.moe_layers:
        moe = model.layers[layer].ffn
        assert isinstance(moe, MoE)
        first, end = mesh.layout.experts_of(mesh.rank, spec.experts_in_layer(layer))
        with torch.device("meta"):
            moe.experts = Experts(end - first, spec.d_model, spec.d_ff, first)
        moe.dispatcher = AllToAllDispatcher(mesh.expert_group, mesh.layout.ep)


def expert_parameters(model: GPT) -> set[str]:
    """Names of the parameters that belong to an expert shard; all others are replicated."""
    return {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters()
    }
