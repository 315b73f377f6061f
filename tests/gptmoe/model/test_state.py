"""Router state in checkpoints: as it was, on every layout, and every sentence if it is not."""

import dataclasses
from pathlib import Path

import pytest
import torch

import gptmoe
from gptmoe.checkpoint import open_checkpoint
from gptmoe.errors import CheckpointError
from gptmoe.model.routers import ROUTERS
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.model.state import read_state
from gptmoe.model.transformer import GPT
from gptmoe.parallel.apply import build
from gptmoe.parallel.layout import Layout
from gptmoe.parallel.mesh import Mesh
from gptmoe.parallel.ownership import state_pieces
from gptmoe.shard.load import load_part
from gptmoe.shard.parts import arrange
from tests import small_model

CPU = torch.device("cpu")
BIASES = ("layers.1.ffn.router.bias", "layers.3.ffn.router.bias")
SPEC = ModelSpec(
    num_layers=4,
    d_model=16,
    num_heads=4,
    d_ff=32,
    vocab_size=51,
    max_seq_len=40,
    num_experts=(4, 8),
    router=RouterSpec(kind="loss_free"),
)
STATE = {BIASES[0]: torch.arange(4.0) / 8, BIASES[1]: torch.arange(8.0) / 4}
LAYOUTS = [
    Layout(),
    Layout(dp=4, ep=2),
    Layout(tp=2, ep=2),
    Layout(dp=2, tp=2, ep=2, expert_tp=True),
    Layout(pp=2, dp=2),
]


def meta(layout: Layout, rank: int) -> GPT:
    """A rank's part of the model with the state above, where it holds the layer."""
    model = build(SPEC, Mesh(layout, rank), CPU, torch.float64, seed=None)
    for name, buffer in model.named_buffers():
        assert not buffer.any()
        buffer.copy_(STATE[name])
    return model


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_exactly_one_rank_writes_each_state_whole(layout: Layout) -> None:
    pieces = [
        piece
        for rank in range(layout.world)
        for piece in state_pieces(meta(layout, rank), layout, rank)
    ]
    assert sorted(piece.name for piece in pieces) == sorted(BIASES)
    for piece in pieces:
        assert piece.box.shape == piece.full_shape
        assert torch.equal(piece.tensor, STATE[piece.name].double())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_rank_of_a_layer_reads_it_whole(
    tmp_path: Path, layout: Layout, dtype: torch.dtype
) -> None:
    checkpoint = small_model.store(tmp_path / "step-00000007", SPEC, STATE)
    wide = torch.promote_types(dtype, torch.float32)
    for rank in range(layout.world):
        model = build(SPEC, Mesh(layout, rank), CPU, torch.float64, seed=None)
        read_state(checkpoint, model, CPU, dtype)
        held = [n for n in BIASES if int(n[7]) in layout.layers_of(rank, SPEC.num_layers)]
        assert [name for name, _ in model.named_buffers()] == held
        for name, buffer in model.named_buffers():
            assert buffer.dtype == wide
            assert torch.equal(buffer, STATE[name].to(wide))
            buffer.zero_()  # the file is not written to
    assert torch.equal(checkpoint.read(BIASES[0]), STATE[BIASES[0]])


@pytest.mark.parametrize("kind", ROUTERS)
def test_what_serving_reads_is_what_training_had(tmp_path: Path, kind: str) -> None:
    router = RouterSpec(kind=kind)  # type: ignore[arg-type]
    checkpoint = open_checkpoint(small_model.write(tmp_path, router=router))
    model = gptmoe.load(tmp_path)
    parts = arrange(model.spec, pp=2)
    stages = [load_part(checkpoint, model.spec, parts, i, torch.float32, CPU).model for i in (0, 1)]
    seen = [dict(stage.named_buffers()) for stage in stages if stage is not None]
    for name, buffer in model.network.named_buffers():
        assert torch.equal(buffer, checkpoint.read(name))
        assert torch.equal(buffer, (seen[0] | seen[1])[name])
        assert buffer.any()


def test_a_state_that_is_missing_or_of_another_model_is_named(tmp_path: Path) -> None:
    missing = small_model.store(
        tmp_path / "missing" / "step-00000007", SPEC, {BIASES[0]: STATE[BIASES[0]]}
    )
    with pytest.raises(CheckpointError) as caught:
        read_state(missing, meta(Layout(), 0), CPU, torch.float32)
    assert str(caught.value) == (
        f"{missing.path} has no layers.3.ffn.router.bias, without which a router of kind loss_free "
        "cannot choose; use a checkpoint that training with router.kind=loss_free has written"
    )
    other = small_model.store(
        tmp_path / "other" / "step-00000007", SPEC, {name: torch.zeros(4) for name in BIASES}
    )
    message = r"layers.3.ffn.router.bias has shape \[4\], the config wants \[8\]; the folder mixes"
    with pytest.raises(CheckpointError, match=message):
        read_state(other, meta(Layout(), 0), CPU, torch.float32)


def test_missing_thresholds_can_be_made_from_data(tmp_path: Path) -> None:
    stored = small_model.store(tmp_path / "step-00000007", SPEC, {BIASES[0]: STATE[BIASES[0]]})
    model = meta(Layout(), 0)
    model.spec = dataclasses.replace(SPEC, router=RouterSpec(kind="expert_choice"))
    with pytest.raises(CheckpointError, match=f"make .* from data: gptmoe calibrate {stored.path}"):
        read_state(stored, model, CPU, torch.float32)
