"""A rank's part of a checkpoint: its boxes, their bytes, and nothing of anybody else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptmoe.checkpoint import Checkpoint
from gptmoe.errors import CheckpointError
from gptmoe.model.experts import Experts
from gptmoe.model.initialize import initialize
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT
from gptmoe.shard.load import Weights, load_part
from gptmoe.shard.parts import ExpertSpan, Part, arrange
from gptmoe.stored import KEPT_WIDE
from tests.small_model import draw_biases, store

SPEC = ModelSpec(
    num_layers=4,
    d_model=16,
    num_heads=2,
    d_ff=32,
    vocab_size=51,
    max_seq_len=16,
    num_experts=(4, 4),
    init_std=0.25,
)
CPU = torch.device("cpu")
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "ep": {"dp": 2, "ep": 2},
    "tp": {"tp": 2},
    "pp": {"pp": 2},
    "tp, pp, ep": {"tp": 2, "pp": 2, "ep": 2},
    "expert ranks": {"ep": 2, "expert_ranks": 2},
    "pp, expert ranks": {"pp": 2, "expert_ranks": 1},
    "hot": {"dp": 4, "ep": 4, "hot": (ExpertSpan(1, 1, 3), ExpertSpan(3, 0, 1))},
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """All weights by name."""
    network = GPT(SPEC)
    initialize(network, seed=3)
    draw_biases(network)
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor]) -> Checkpoint:
    return store(tmp_path_factory.mktemp("checkpoints") / "step-00000007", SPEC, tensors)


def plain(checkpoint: Checkpoint, parts: Sequence[Part], rank: int) -> Weights:
    """In float64, for which no kernel packs weights: they can be looked at."""
    return load_part(checkpoint, SPEC, parts, rank, torch.float64, CPU)


def held(weights: Weights) -> dict[str, Tensor]:
    """All that a part holds, by name."""
    found: dict[str, Tensor] = {
        f"layers.{layer}.ffn.experts.{name}": parameter
        for layer, experts in weights.experts.items()
        for name, parameter in experts.named_parameters()
    }
    return found | dict(weights.model.named_parameters() if weights.model else {})


def is_expert(name: str) -> bool:
    return ".ffn.experts." in name


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_part_holds_its_experts_and_nothing_is_left_out(
    checkpoint: Checkpoint, tensors: dict[str, Tensor], name: str
) -> None:
    parts = arrange(SPEC, **LAYOUTS[name])
    seen = set()
    for rank, part in enumerate(parts):
        weights = plain(checkpoint, parts, rank)
        assert set(weights.experts) == set(part.layers) & set(SPEC.moe_layers)
        for parameter, tensor in held(weights).items():
            assert tensor.dtype == torch.float64
            assert not tensor.requires_grad
            seen.add(parameter)
            if is_expert(parameter):
                mine = list(part.experts_in(int(parameter.split(".")[1])))
                assert torch.equal(tensor, tensors[parameter][mine].double())
            elif part.slices == 1:
                assert torch.equal(tensor, tensors[parameter].double())
    assert seen == set(tensors)


def test_slices_hold_halves_that_make_a_whole(
    checkpoint: Checkpoint, tensors: dict[str, Tensor]
) -> None:
    parts = arrange(SPEC, tp=2)
    one, other = (held(plain(checkpoint, parts, rank)) for rank in (0, 1))
    for name, dim in {
        "embed.tokens.weight": 0,
        "layers.0.attention.out.weight": 1,
        "layers.0.ffn.up.weight": 0,
        "layers.0.ffn.up.bias": 0,
        "layers.0.ffn.down.weight": 1,
    }.items():
        assert torch.equal(torch.cat((one[name], other[name]), dim), tensors[name].double())
    assert (len(one["embed.tokens.weight"]), len(other["embed.tokens.weight"])) == (25, 26)
    queries, keys, values = tensors["layers.2.attention.qkv.weight"].double().chunk(3)
    halves = [(t[:8], t[8:]) for t in (queries, keys, values)]
    for mine, index in ((one, 0), (other, 1)):
        expected = torch.cat([pair[index] for pair in halves])
        assert torch.equal(mine["layers.2.attention.qkv.weight"], expected)
    for name in ("norm.weight", "layers.1.ffn.router.weight", "layers.0.ffn.down.bias"):
        assert torch.equal(one[name], other[name])


def test_stages_hold_their_layers_and_both_ends_the_token_table(checkpoint: Checkpoint) -> None:
    parts = arrange(SPEC, pp=2)
    first, last = (set(held(plain(checkpoint, parts, rank))) for rank in (0, 1))
    assert first & last == {"embed.tokens.weight"}
    assert {name for name in first if name.startswith("layers.")} == {
        name for name in first if name.startswith(("layers.0.", "layers.1."))
    }
    assert "embed.positions.weight" in first
    assert {"norm.weight", "norm.bias"} <= last


def test_a_packed_head_is_all_that_the_last_stage_has_of_the_token_table(
    checkpoint: Checkpoint,
) -> None:
    parts = arrange(SPEC, pp=2)
    first, last = (load_part(checkpoint, SPEC, parts, i, torch.float32, CPU) for i in (0, 1))
    assert "embed.tokens.weight" in held(first)
    assert "embed.tokens.weight" not in held(last)
    assert last.model is not None
    hidden_BTD = torch.linspace(-1, 1, 3 * SPEC.d_model).view(1, 3, -1)
    table = plain(checkpoint, arrange(SPEC), 0).model
    assert table is not None
    with torch.inference_mode():
        expected = table.logits(table.norm(hidden_BTD.double()))
        found = last.model.logits(last.model.norm(hidden_BTD))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 3])
def test_a_rank_of_experts_alone_holds_no_attention(checkpoint: Checkpoint, rank: int) -> None:
    parts = arrange(SPEC, dp=2, ep=2, expert_ranks=2)
    weights = plain(checkpoint, parts, rank)
    assert weights.model is None
    assert [weights.experts[layer].count for layer in (1, 3)] == [2, 2]
    assert all(map(is_expert, held(weights)))


def test_a_rank_of_attention_and_one_of_experts_hold_all_weights_once(
    checkpoint: Checkpoint, tensors: dict[str, Tensor]
) -> None:
    parts = arrange(SPEC, expert_ranks=1)
    attention, experts = (plain(checkpoint, parts, rank) for rank in (0, 1))
    assert all(not tensor.numel() for name, tensor in held(attention).items() if is_expert(name))
    assert set(held(experts)) == set(filter(is_expert, tensors))
    assert attention.num_bytes + experts.num_bytes == 8 * sum(t.numel() for t in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "rank"),
    [("alone", 0), ("tp, pp, ep", 1), ("tp, pp, ep", 2), ("expert ranks", 0), ("hot", 3)],
)
def test_bytes_are_counted_and_progress_reaches_the_total(
    checkpoint: Checkpoint, layout: str, rank: int, dtype: torch.dtype
) -> None:
    parts = arrange(SPEC, **LAYOUTS[layout])
    told: list[tuple[int, int]] = []
    weights = load_part(
        checkpoint, SPEC, parts, rank, dtype, CPU, lambda done, total: told.append((done, total))
    )
    num_bytes = sum(
        tensor.numel() * (4 if dtype == torch.bfloat16 and wide(name) else dtype.itemsize)
        for name, tensor in held(plain(checkpoint, parts, rank)).items()
    )
    assert weights.num_bytes == num_bytes
    assert told == sorted(told)
    assert told[-1] == (num_bytes, num_bytes)
    assert {total for _, total in told} == {num_bytes}


def wide(name: str) -> bool:
    return any(part in name for part in KEPT_WIDE)


@pytest.mark.parametrize("rank", [0, 2])
def test_packed_experts_answer_as_plain_ones(
    checkpoint: Checkpoint, tensors: dict[str, Tensor], rank: int
) -> None:
    parts = arrange(SPEC, ep=2, expert_ranks=2, hot=(ExpertSpan(1, 0, 1),))
    weights = load_part(checkpoint, SPEC, parts, rank, torch.float32, CPU)
    mine = list(parts[rank].experts_in(1))
    assert mine == ([] if rank == 0 else [0, 2, 3])
    assert weights.experts[1].count == len(mine)
    reference = Experts(len(mine), SPEC.d_model, SPEC.d_ff)
    reference.load_state_dict(
        {name: tensors[f"layers.1.ffn.experts.{name}"][mine] for name in reference.state_dict()}
    )
    rows_RD = torch.linspace(-1, 1, 5 * len(mine) * SPEC.d_model).view(-1, SPEC.d_model)
    with torch.inference_mode():
        answers_RD = weights.experts[1](rows_RD, [5] * len(mine))
        torch.testing.assert_close(answers_RD, reference(rows_RD, [5] * len(mine)))


def test_a_tensor_that_is_missing_or_of_another_model_is_named(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    parts = arrange(SPEC, expert_ranks=1)
    router = "layers.1.ffn.router.weight"
    missing = store(
        tmp_path / "missing" / "step-00000001",
        SPEC,
        {name: tensor for name, tensor in tensors.items() if name != router},
    )
    assert plain(missing, parts, 1).num_bytes
    with pytest.raises(CheckpointError, match=f"no tensor {router}"):
        plain(missing, parts, 0)
    experts = "layers.3.ffn.experts.up_bias"
    narrow = {**tensors, experts: tensors[experts][:, :30]}
    other = store(tmp_path / "other" / "step-00000001", SPEC, narrow)
    with pytest.raises(CheckpointError, match=rf"{experts} has shape \[4, 30\].* wants \[4, 32\]"):
        plain(other, parts, 1)
