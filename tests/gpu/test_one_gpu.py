"""What only a GPU can show: its grouped kernel, float16 in earnest, memory saved and offloaded."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gptmoe.model.dropout import SampleDropout
from gptmoe.model.experts import Experts
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.parallel.apply import build
from gptmoe.parallel.layout import Layout
from gptmoe.parallel.loss_scale import LossScale
from gptmoe.parallel.mesh import Mesh, single
from gptmoe.parallel.optimizer import OptimizerSpec
from gptmoe.parallel.recompute import Recompute
from gptmoe.parallel.updater import PlainUpdater

GPU, CPU = torch.device("cuda"), torch.device("cpu")
SPEC = ModelSpec(
    num_layers=4,
    d_model=256,
    num_heads=8,
    d_ff=1024,
    vocab_size=1024,
    max_seq_len=256,
    num_experts=(8, 8),
    init_std=0.02,
    router=RouterSpec(group_sequences=4),
)


def tokens(count: int = 8, length: int = 256) -> Tensor:
    return torch.randint(1024, (count, length), generator=torch.Generator().manual_seed(0))


def test_the_grouped_kernel_gives_the_loops_numbers() -> None:
    torch.manual_seed(0)
    experts = Experts(8, 256, 1024)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    rows_RD, rows = torch.randn(512, 256), [100, 0, 12, 200, 0, 1, 99, 100]
    expected = experts(rows_RD, rows)
    found = experts.to(GPU)(rows_RD.to(GPU, torch.bfloat16), rows)
    assert (found.float().cpu() - expected).norm() < 2e-2 * expected.norm()


def loss_of(device: torch.device, dtype: torch.dtype) -> float:
    model = build(SPEC, single(), device, compute_dtype=dtype, seed=1).eval()
    token_BT = tokens().to(device)
    everywhere = torch.ones_like(token_BT, dtype=torch.bool)
    with torch.no_grad():
        return float(model.loss_sum(model(token_BT).hidden_BTD, token_BT, everywhere))


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)]
)
def test_a_gpu_has_the_cpus_loss(dtype: torch.dtype, close: float) -> None:
    assert loss_of(GPU, dtype) == pytest.approx(loss_of(CPU, torch.float32), rel=close)


def test_offloaded_weights_train_as_those_on_the_gpu() -> None:
    dense = replace(SPEC, num_experts=())
    norms = []
    for mesh, place in ((single(), None), (Mesh(Layout(sharded=True), 0), CPU)):
        model = build(dense, mesh, GPU, seed=1, shards_on=place)
        updater = PlainUpdater(model, mesh, OptimizerSpec())
        token_BT = tokens().to(GPU)
        everywhere = torch.ones_like(token_BT, dtype=torch.bool)
        for _ in range(3):
            model.loss_sum(model(token_BT).hidden_BTD, token_BT, everywhere).backward()
            norms.append(updater.step(1e-3))
    assert norms[3:] == pytest.approx(norms[:3], rel=1e-4)


def test_float16_learns_with_a_scaled_loss_and_finds_its_scale() -> None:
    model = build(SPEC, single(), GPU, compute_dtype=torch.float16, seed=1).train()
    updater = PlainUpdater(model, single(), OptimizerSpec())
    token_BT, losses, scale = tokens().to(GPU), [], LossScale(value=2.0**24)
    everywhere = torch.ones_like(token_BT, dtype=torch.bool)
    for _ in range(30):
        output = model(token_BT)
        loss = model.loss_sum(output.hidden_BTD, token_BT, everywhere) / token_BT.numel()
        (loss * scale.value).backward()
        norm = torch.tensor(updater.step(1e-3, scale.value))
        scale = scale.after(overflow=not bool(norm.isfinite()))
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert scale.value < 2.0**24  # so large a scale overflows float16


def peak_bytes(what: Recompute) -> int:
    model = build(
        SPEC, single(), GPU, compute_dtype=torch.bfloat16, seed=1, recompute_what=what
    ).train()
    token_BT = tokens(32).to(GPU)
    drop = SampleDropout(probability=0.1, seed=0, step=1, first_sample=0, length=256)
    everywhere = torch.ones_like(token_BT, dtype=torch.bool)
    torch.cuda.reset_peak_memory_stats()
    output = model(token_BT, drop=drop)
    model.loss_sum(output.hidden_BTD, token_BT, everywhere).backward()
    return torch.cuda.max_memory_allocated()


def test_recompute_saves_memory() -> None:
    none, full = peak_bytes("none"), peak_bytes("full")
    assert full < none
