"""What a gathered weight costs: memory only while it is used, and no second product."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from gptmoe.errors import LayoutError
from gptmoe.model.spec import ModelSpec
from gptmoe.parallel import mesh, shards
from gptmoe.parallel.apply import build
from gptmoe.parallel.layout import Layout

SPEC = ModelSpec(num_layers=2, d_model=16, num_heads=2, d_ff=32, vocab_size=40, max_seq_len=8)
CPU = torch.device("cpu")


class Calls(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def loss_of(layout: Layout) -> Callable[[], Tensor]:
    model = build(SPEC, mesh.Mesh(layout, 0), CPU, compute_dtype=torch.bfloat16)
    token_BT = torch.arange(16).view(2, 8)
    weight_BT = torch.ones(2, 8, dtype=torch.bool)
    return lambda: model.loss_sum(model(token_BT).hidden_BTD, token_BT, weight_BT)


def test_the_backward_pass_gathers_again_but_multiplies_no_more() -> None:
    counts = []
    for layout in (Layout(), Layout(sharded=True)):
        with Calls() as calls:
            loss_of(layout)().backward()
        counts.append({name: n for name, n in calls.counts.items() if "mm" in name})
    assert counts[0] == counts[1] != {}


def test_no_gathered_weight_waits_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[StorageWeakRef] = []

    def gather_rows(rows: Tensor, *_: object) -> Tensor:
        whole = rows.clone()
        gathered.append(StorageWeakRef(whole.untyped_storage()))
        return whole

    monkeypatch.setattr(shards, "gather_rows", gather_rows)
    loss = loss_of(Layout(sharded=True))()
    forward = len(gathered)
    assert forward == 2 * 4 + 3  # each layer's matrices, two tables, the head
    assert all(weight.expired() for weight in gathered)
    loss.backward()
    assert len(gathered) == forward + 2 * 4 + 1  # a lookup's gradient needs no table
    assert all(weight.expired() for weight in gathered)


def test_rows_may_lie_elsewhere_than_the_computation() -> None:
    """`meta` stands for a GPU: shapes and devices without values."""
    model = build(
        SPEC, mesh.Mesh(Layout(sharded=True), 0), torch.device("meta"), seed=None, shards_on=CPU
    )
    loss = model.logits(model(torch.zeros(1, 8, dtype=torch.long, device="meta")).hidden_BTD).sum()
    assert loss.device.type == "meta"
    places = {name: parameter.device.type for name, parameter in model.named_parameters()}
    assert places["layers.0.ffn.up.weight"] == places["embed.tokens.weight"] == "cpu"
    assert places["layers.0.ffn.up.bias"] == places["norm.weight"] == "meta"


@pytest.mark.parametrize("rows", [4, 5, 6, 7, 41])
def test_shards_are_as_equal_as_can_be(rows: int) -> None:
    sizes = Layout(dp=4, sharded=True).shard_sizes(rows)
    assert sum(sizes) == rows
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("other", [{"tp": 2}, {"pp": 2}, {"ep": 2}])
def test_other_parallelism_is_refused(other: dict[str, int]) -> None:
    with pytest.raises(LayoutError, match=r"parallel.zero=3 shares weights over parallel.dp alone"):
        Layout(**{"dp": 2, "sharded": True, **other})


def test_experts_are_refused() -> None:
    spec = replace(SPEC, num_experts=(4,))
    with pytest.raises(LayoutError, match=r"zero=3 is for dense models, but 1 layers have experts"):
        Layout(dp=2, sharded=True).check_model(spec)
