"""Layers as one call of kernels: the bits of their parts, and used wherever they can be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gptmoe.generate.cache import KVCache
from gptmoe.generate.fused import FusedBlock
from gptmoe.generate.kernels.library import Kernels, kernels
from gptmoe.generate.kernels.row_attention import RowAttend
from gptmoe.generate.kernels.tasks import Calls
from gptmoe.generate.packed import SeparateExperts, pack
from gptmoe.generate.plan import Span
from gptmoe.generate.quantized import quantize
from gptmoe.model.initialize import initialize
from gptmoe.model.moe import MoE
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT, Block
from gptmoe.stored import KEPT_WIDE

pytestmark = pytest.mark.skipif(kernels() is None, reason="no C compiler (cc) is installed")
CPU = torch.device("cpu")
FORMS: dict[str, Callable[[GPT], Any]] = {
    "packed": pack,
    "mapped": lambda network: pack(network, experts=False),
    "int8": lambda network: quantize(network, "int8"),
    "int4": lambda network: quantize(network, "int4"),
}
each_form = pytest.mark.parametrize("form", FORMS)


def make(form: str = "packed", d_model: int = 128, d_ff: int = 256, experts: bool = True) -> GPT:
    spec = ModelSpec(
        num_layers=4,
        d_model=d_model,
        num_heads=d_model // 64,
        d_ff=d_ff,
        vocab_size=96,
        max_seq_len=256,
        num_experts=(4, 2) if experts else (),
        init_std=0.2,
    )
    network = GPT(spec, compute_dtype=torch.bfloat16)
    initialize(network, seed=1)
    for name, parameter in network.named_parameters():
        if not any(part in name for part in KEPT_WIDE):
            parameter.data = parameter.data.bfloat16()
    FORMS[form](network.requires_grad_(False))
    return network.eval()


def make_fused(form: str = "packed", experts: bool = True) -> GPT:
    """Skips on processors for which we have no kernel of that form."""
    network = make(form, experts=experts)
    moe = network.layers[1].ffn
    has_programs = isinstance(network.layers[0], FusedBlock)
    if isinstance(moe, MoE):
        assert isinstance(moe.experts, SeparateExperts)
        has_programs &= moe.experts.entering is not None
    if not has_programs:
        pytest.skip("this CPU's weights of that form cannot be part of a program")
    return network


def spans(slots: int, start: int) -> list[Span]:
    return [Span("", slot, start, 1, outputs=1) for slot in range(slots)]


@torch.inference_mode()
def steps(network: GPT, rows: int, cache: KVCache | None = None) -> Tensor:
    """Hidden states of three decoding steps of so many sequences, [3, R, D]."""
    cache = cache or KVCache(network.spec, rows, torch.bfloat16, CPU)
    compiled, found = kernels(), []
    assert compiled is not None
    for position in range(3):
        token_1R = (torch.arange(rows) * 7 + position).view(1, -1) % 96
        attend = RowAttend(cache, spans(rows, position), compiled)
        output = network(token_1R, torch.full((1, rows), position), attend=attend)
        found.append(output.hidden_BTD[0])
    return torch.stack(found)


def taken_apart(network: GPT) -> GPT:
    """The same weights in layers whose kernels are called one by one."""
    for block in network.layers:
        assert isinstance(block, FusedBlock)
        block.__class__ = Block
    return network


@each_form
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 32, 33])
def test_bits_are_those_of_the_parts(form: str, rows: int) -> None:
    fused = make_fused(form)
    expected = steps(taken_apart(make_fused(form)), rows)
    assert expected.isfinite().all()
    assert torch.equal(steps(fused, rows), expected)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[Calls]:
    """Those that were run."""
    found, own = [], Kernels.run_program

    def run(self: Kernels, calls: Calls) -> None:
        found.append(calls)
        own(self, calls)

    monkeypatch.setattr(Kernels, "run_program", run)
    return found


@each_form
def test_a_step_of_few_rows_is_one_call_a_layer(form: str, programs: list[Calls]) -> None:
    network = make_fused(form, experts=False)
    block = network.layers[0]
    assert isinstance(block, FusedBlock)
    has_few = getattr(block.attention.qkv.weight, "few_rows", None) is not None
    assert block.most_rows == (8 if has_few else 32)
    for rows in (1, block.most_rows):
        programs.clear()
        steps(network, rows)
        assert len(programs) == 3 * 4
    programs.clear()
    steps(network, block.most_rows + 1)
    assert not programs


@each_form
def test_a_layer_with_experts_is_two_calls(form: str, programs: list[Calls]) -> None:
    steps(make_fused(form), 3)
    assert len(programs) == 3 * (1 + 2) * 2
    dense, before_experts, _ = programs[:3]
    assert before_experts.count < dense.count


def test_networks_of_one_cache_do_not_meet() -> None:
    """As when weights are refreshed: the old ones may end their requests meanwhile."""
    first, second = make_fused(), make_fused(experts=False)
    cache = KVCache(first.spec, 2, torch.bfloat16, CPU)
    expected = [steps(network, 2) for network in (first, second)]
    for _ in range(2):
        for network, wanted in zip((first, second), expected, strict=True):
            assert torch.equal(steps(network, 2, cache), wanted)


def test_programs_go_with_their_weights() -> None:
    network = make_fused()
    cache = KVCache(network.spec, 2, torch.bfloat16, CPU)
    steps(network, 2, cache)
    assert len(cache.workspace.programs) == 4
    del network
    assert not cache.workspace.programs


@pytest.mark.parametrize(("d_model", "d_ff"), [(64, 80), (64, 256)])
def test_widths_that_fill_no_instruction_are_computed_in_parts(d_model: int, d_ff: int) -> None:
    make_fused()
    network = make("packed", d_model, d_ff)
    assert isinstance(network.layers[0], FusedBlock) == (d_ff == 256)
    assert steps(network, 2).isfinite().all()


def test_float32_has_no_programs() -> None:
    network = GPT(make().spec)
    pack(network.requires_grad_(False))
    assert all(type(block) is Block for block in network.layers)


@each_form
@pytest.mark.parametrize("counts", [[1, 0, 0, 0], [0, 2, 1, 8], [0, 33, 1, 0], [0, 0, 0, 0]])
def test_experts_have_the_bits_of_their_parts(form: str, counts: list[int]) -> None:
    moe = make_fused(form).layers[1].ffn
    assert isinstance(moe, MoE)
    experts = moe.experts
    assert isinstance(experts, SeparateExperts)
    numbers = torch.Generator().manual_seed(0)
    rows_RD = torch.randn(sum(counts), 128, generator=numbers).bfloat16()
    with torch.inference_mode():
        found = experts(rows_RD, counts)
        experts.entering = None
        assert torch.equal(found, experts(rows_RD, counts))
