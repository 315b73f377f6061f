"""Layers as one call of kernels: the bits of their parts, and used wherever they can be."""

import pytest
import torch

from gptmoe.generate.cache import KVCache
from gptmoe.generate.fused import FusedBlock
from gptmoe.generate.kernels.library import kernels
from gptmoe.generate.kernels.tasks import Calls
from gptmoe.generate.packed import SeparateExperts, pack
from gptmoe.model.moe import MoE
from gptmoe.model.transformer import GPT, Block

from .fused_networks import CPU, each_form, make, make_fused, steps, taken_apart

pytestmark = pytest.mark.skipif(kernels() is None, reason="no C compiler (cc) is installed")


@each_form
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 32, 33])
def test_bits_are_those_of_the_parts(form: str, rows: int) -> None:
    fused = make_fused(form)
    expected = steps(taken_apart(make_fused(form)), rows)
    assert expected.isfinite().all()
    assert torch.equal(steps(fused, rows), expected)


@each_form
def test_a_step_of_few_rows_is_one_call(form: str, programs: list[Calls]) -> None:
    network = make_fused(form, experts=())
    block = network.layers[0]
    assert isinstance(block, FusedBlock)
    has_few = getattr(block.attention.qkv.weight, "few_rows", None) is not None
    assert block.most_rows == (8 if has_few else 32)
    for rows in (1, block.most_rows):
        programs.clear()
        steps(network, rows)
        assert len(programs) == 3
    programs.clear()
    steps(network, block.most_rows + 1)
    assert not programs


@each_form
def test_stages_are_a_call_each(form: str, programs: list[Calls]) -> None:
    """Of a pipeline: the first begins with tokens, the last ends with a norm."""
    network = make_fused(form)
    expected = steps(network, 3)
    caches = [
        KVCache(network.spec, 3, torch.bfloat16, CPU, layers=layers)
        for layers in (range(1), range(1, 3), range(3, 4))
    ]
    programs.clear()
    assert torch.equal(steps(network, 3, *caches), expected)
    assert len(programs) == 3 * 3


@pytest.mark.parametrize("odd", [0, 1, 3])
def test_where_one_layer_is_no_call_the_others_are(odd: int, programs: list[Calls]) -> None:
    network = make_fused()
    expected = steps(network, 2)
    network.layers[odd].__class__ = Block
    programs.clear()
    assert torch.equal(steps(network, 2), expected)
    assert len(programs) == 3 * (3 + odd % 2)  # the experts of a plain layer are a call


def test_networks_of_one_cache_do_not_meet() -> None:
    """As when weights are refreshed: the old ones may end their requests meanwhile."""
    first, second = make_fused(), make_fused(experts=())
    cache = KVCache(first.spec, 2, torch.bfloat16, CPU)
    expected = [steps(network, 2) for network in (first, second)]
    for _ in range(2):
        for network, wanted in zip((first, second), expected, strict=True):
            assert torch.equal(steps(network, 2, cache), wanted)


def test_programs_go_with_their_weights() -> None:
    network = make_fused()
    cache = KVCache(network.spec, 2, torch.bfloat16, CPU)
    steps(network, 2, cache)
    assert len(cache.workspace.programs) == 1
    network.layers[2].__class__ = Block
    steps(network, 2, cache)
    assert len(cache.workspace.programs) == 1 + 3
    del network
    assert not cache.workspace.programs


@pytest.mark.parametrize(("d_model", "d_ff"), [(64, 80), (64, 256)])
def test_widths_that_fill_no_instruction_are_computed_in_parts(d_model: int, d_ff: int) -> None:
    make_fused()
    network = make("packed", d_model=d_model, d_ff=d_ff)
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
