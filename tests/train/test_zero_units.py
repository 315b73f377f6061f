"""ZeRO 1 in one process: flat fragments as boxes, and the same steps as the plain updater."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gptmoe.checkpoint.boxes import Box, Piece
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.model.transformer import GPT
from gptmoe.parallel.apply import build
from gptmoe.parallel.cuts import Cut
from gptmoe.parallel.mesh import single
from gptmoe.parallel.optimizer import OptimizerSpec
from gptmoe.parallel.ownership import Owned
from gptmoe.parallel.updater import MOMENTS, PlainUpdater, Updater
from train.zero import ZeroUpdater
from train.zero_state import Fragment, moment_pieces

SPEC = ModelSpec(
    num_layers=2,
    d_model=12,
    num_heads=2,
    d_ff=20,
    vocab_size=31,
    max_seq_len=8,
    num_experts=(4,),
    router=RouterSpec(group_sequences=1),
)
ADAMW = OptimizerSpec(max_grad_norm=0.5)
SGD = OptimizerSpec(kind="sgd", max_grad_norm=0.5)
BOTH = (PlainUpdater, ZeroUpdater)


@pytest.fixture(autouse=True)
def _leave_no_process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def network() -> GPT:
    return build(SPEC, single(), torch.device("cpu"), seed=3)


def train(model: GPT, updater: Updater, steps: range) -> list[float]:
    """Steps with random gradients, a function of the step; the norms."""
    norms = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        norms.append(updater.step(1e-2 / (1 + step)))
    return norms


def reader(pieces: list[Piece]) -> Callable[[str, Box], torch.Tensor]:
    """Reads boxes from the pieces of all ranks, as a checkpoint does."""
    whole: dict[str, torch.Tensor] = {}
    for piece in pieces:
        tensor = whole.setdefault(piece.name, torch.full(piece.full_shape, math.nan))
        tensor[piece.box.slices(Box.whole(piece.full_shape))] = piece.tensor
    return lambda name, box: whole[name][box.slices(Box.whole(whole[name].shape))]


@given(st.lists(st.integers(1, 5), max_size=4), st.integers(0, 3), st.data())
def test_fragments_of_any_cut_hold_the_tensor_once(
    shape: list[int], shift: int, data: st.DataObject
) -> None:
    parameter = nn.Parameter(torch.randn(shape))
    count = parameter.numel()
    start = tuple(shift if dim == 0 else 0 for dim in range(len(shape)))
    full = tuple(start[dim] + size for dim, size in enumerate(shape))
    held = Cut(
        (Box(start, tuple(shape)),),
        is_expert=False,
        is_partial=False,
        is_sharded=False,
        is_tied=False,
        is_first_copy=True,
        copies=1,
        turn=0,
    )
    owned = Owned("p", parameter, full, held, writes=True)
    cuts = sorted(data.draw(st.sets(st.integers(0, count))) | {0, count})
    partition = torch.cat([torch.zeros(2), parameter.detach().flatten()])
    state = dict.fromkeys(MOMENTS, partition) | {"step": torch.tensor(7.0)}
    pieces = [
        piece
        for first, stop in pairwise(cuts)
        for piece in moment_pieces(Fragment(owned, first, stop, 0, partition, first + 2), state)
    ]
    steps = [float(piece.tensor) for piece in pieces if piece.name == "step/p"]
    assert steps == ([] if any(start) else [7.0])
    moments = [piece for piece in pieces if piece.name == "exp_avg/p"]
    assert sum(piece.box.volume for piece in moments) == count
    assert torch.equal(reader(moments)("exp_avg/p", held.boxes[0]), parameter.detach())


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("max_grad_norm", [0.5, 0.0])
def test_one_rank_takes_the_plain_updaters_steps(
    optimizer: OptimizerSpec, max_grad_norm: float
) -> None:
    optimizer = OptimizerSpec(kind=optimizer.kind, max_grad_norm=max_grad_norm)
    models = [network(), network()]
    norms = [
        train(model, updater(model, single(), optimizer), range(5))
        for model, updater in zip(models, BOTH, strict=True)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    for plain, zero in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(zero, plain, rtol=1e-5, atol=1e-7)


def test_norm_of_ones_counts_each_parameter_once() -> None:
    model = network()
    updater = ZeroUpdater(model, single(), SGD)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert updater.step(0.0) == pytest.approx(math.sqrt(count), rel=1e-6)


def test_a_parameter_without_a_gradient_decays_as_in_the_plain_updater() -> None:
    models = [network(), network()]
    for model, updater in zip(models, BOTH, strict=True):
        model.norm.weight.grad = torch.ones_like(model.norm.weight)
        updater(model, single(), ADAMW).step(0.1)
    for plain, zero in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(zero, plain)


@pytest.mark.parametrize(("writer", "reading"), [BOTH, BOTH[::-1], BOTH[1:] * 2])
def test_state_passes_between_updaters_without_a_difference(
    writer: type[Updater], reading: type[Updater]
) -> None:
    model = network()
    first = writer(model, single(), ADAMW)
    assert first.state_pieces() == []
    train(model, first, range(3))
    pieces = first.state_pieces()
    names = [name for name, _ in model.named_parameters()]
    assert {piece.name for piece in pieces} == {
        f"{kind}/{name}" for kind in (*MOMENTS, "step") for name in names
    }
    second = reading(model, single(), ADAMW)
    second.load_state(reader(pieces))
    before, after = reader(pieces), reader(second.state_pieces())
    for piece in pieces:
        assert torch.equal(before(piece.name, piece.box), after(piece.name, piece.box))


def test_sgd_has_no_state() -> None:
    model = network()
    updater = ZeroUpdater(model, single(), SGD)
    train(model, updater, range(1))
    assert updater.state_pieces() == []
    updater.load_state(reader([]))


def test_updates_start_from_the_models_present_weights() -> None:
    model = network()
    with torch.no_grad():
        model.norm.bias.fill_(5.0)
    train(model, ZeroUpdater(model, single(), SGD), range(1))
    assert torch.all((model.norm.bias - 5).abs() < 0.1)


def test_a_model_on_the_cpu_trains_beside_a_gpu() -> None:
    set_accelerator(CUDA_Accelerator())  # what DeepSpeed finds for itself on such a machine
    model = network()
    train(model, ZeroUpdater(model, single(), ADAMW), range(1))


SCRIPT = """
from cluster import env
env.prepare()
from tests.train.test_zero_units import SGD, ZeroUpdater, network, single, train
model = network()
train(model, ZeroUpdater(model, single(), SGD), range(2))
"""


def test_it_compiles_and_prints_nothing(tmp_path: Path) -> None:
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert list(tmp_path.iterdir()) == []
