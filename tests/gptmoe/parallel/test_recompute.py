"""gptmoe.parallel.recompute: the same gradients from less memory."""

import pytest
import torch
from torch import Tensor

from gptmoe.model.dropout import SampleDropout
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.parallel.apply import build
from gptmoe.parallel.mesh import single
from gptmoe.parallel.recompute import Recompute

SPEC = ModelSpec(
    num_layers=4,
    d_model=32,
    num_heads=4,
    d_ff=64,
    vocab_size=50,
    max_seq_len=64,
    num_experts=(4, 4),
    init_std=0.1,
    router=RouterSpec(group_sequences=2, capacity_factor=1.0),
)
DROP = SampleDropout(probability=0.2, seed=0, step=1, first_sample=0, length=64)


def learn(what: Recompute, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], int]:
    """The gradients, and the bytes that the forward pass keeps beside the weights."""
    model = build(SPEC, single(), torch.device("cpu"), dtype, seed=1, recompute_what=what).train()
    token_BT = torch.randint(50, (4, 64), generator=torch.Generator().manual_seed(0))
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(token_BT, drop=DROP)
        loss = model.loss_sum(output.hidden_BTD, token_BT, torch.ones_like(token_BT).bool())
        loss = loss + sum(routing.losses["aux_loss"] for routing in output.routings)
    num_bytes = sum(kept.values())
    loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], (
        num_bytes
    )


@pytest.mark.parametrize("what", ["sel", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_have_the_same_bits(what: Recompute, dtype: torch.dtype) -> None:
    expected, found = learn("none", dtype)[0], learn(what, dtype)[0]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_memory_falls_with_what_is_computed_again() -> None:
    none, sel, full = (learn(what, torch.bfloat16)[1] for what in ("none", "sel", "full"))
    assert full < sel < none
    assert full < 0.5 * none
