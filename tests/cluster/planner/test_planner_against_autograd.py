"""What the planner says a layer keeps, against what autograd keeps of the real model."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cluster.planner.job import Choice, Job
from cluster.planner.memory import fullest
from gptmoe.model.initialize import initialize
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.model.transformer import GPT
from gptmoe.parallel.layout import Layout

SEQUENCES, TOKENS = 4, 128


def kept_bytes(model: GPT) -> int:
    """Bytes that the forward pass leaves for the backward pass, parameters apart."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.randint(100, (SEQUENCES, TOKENS)))
    assert output.hidden_BTD.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


DENSE = ModelSpec(
    num_layers=4, d_model=128, num_heads=4, d_ff=512, vocab_size=100, max_seq_len=TOKENS
)
SWITCH = replace(DENSE, num_experts=(8, 8), router=RouterSpec(group_sequences=2))
CHOOSING = replace(SWITCH.router, kind="expert_choice", capacity_factor=1.0, margin_coef=0.0)
SPECS = {
    "dense": DENSE,
    "switch": SWITCH,
    "top2": replace(SWITCH, router=replace(SWITCH.router, kind="top2", capacity_factor=8.0)),
    "residual MoE": replace(SWITCH, residual_moe=True),
    "expert choice": replace(SWITCH, router=CHOOSING),
    "expert choice, no residual": replace(SWITCH, router=replace(CHOOSING, residual_depth=0)),
    "expert choice, 3 layers": replace(SWITCH, router=replace(CHOOSING, residual_depth=3)),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_those_of_the_model(spec: ModelSpec, dtype: str) -> None:
    narrow = dtype == "bfloat16"
    model = GPT(spec, torch.bfloat16 if narrow else torch.float32)
    initialize(model, seed=0)
    model.train()
    job = Job(
        spec=spec,
        batch_sequences=SEQUENCES,
        seq_len=TOKENS,
        dtype="bfloat16" if narrow else "float32",
        fused_attention=not narrow,  # this machine's kernels
    )
    memory = fullest(job, Choice(layout=Layout(), microbatch_size=SEQUENCES))
    planned = memory.activations + memory.cast_weights
    assert kept_bytes(model) == pytest.approx(planned, rel=0.04)
