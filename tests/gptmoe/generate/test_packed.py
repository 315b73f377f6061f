"""Packed weights: the same model, faster; and where it cannot be."""

import pytest
import torch

from gptmoe.generate.kernels.library import kernels
from gptmoe.generate.packed import PackedExperts, ServedExperts, pack
from gptmoe.generate.packed_weight import PackedWeight, _kernel_rows
from gptmoe.model.experts import MIN_ROWS
from gptmoe.model.initialize import initialize
from gptmoe.model.layers import ServedWeight
from gptmoe.model.moe import MoE
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT
from tests.small_model import draw_biases

SPEC = ModelSpec(
    num_layers=2,
    d_model=32,
    num_heads=2,
    d_ff=64,
    vocab_size=50,
    max_seq_len=64,
    num_experts=(4,),
    init_std=0.3,
)


def make_network(dtype: torch.dtype) -> GPT:
    network = GPT(SPEC, compute_dtype=dtype)
    initialize(network, seed=0)
    draw_biases(network)
    return network.eval()


def make_rows(count: int) -> torch.Tensor:
    return torch.randn(count, SPEC.d_model, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(network: GPT) -> torch.Tensor:
    token_BT = torch.arange(24).view(2, 12)
    return network.logits(network(token_BT).hidden_BTD)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_packed_network_computes_the_same(dtype: torch.dtype, close: float) -> None:
    plain, packed = make_network(dtype), make_network(dtype)
    assert pack(packed)
    expected = logits(plain)
    scale = float(expected.abs().max())
    assert torch.allclose(logits(packed), expected, rtol=0, atol=close * scale)


def test_names_stay_and_plain_weights_go() -> None:
    network = make_network(torch.float32)
    names = [name for name, _ in network.named_parameters()]
    moe = network.layers[1].ffn
    assert isinstance(moe, MoE)
    plain = moe.experts
    assert pack(network)
    packed = network.layers[1].ffn.experts
    assert isinstance(packed, PackedExperts)
    assert packed.count == 4
    assert not hasattr(plain, "up_weight")
    assert not hasattr(plain, "down_weight")
    gone = {"layers.1.ffn.experts.up_weight", "layers.1.ffn.experts.down_weight"}
    assert [name for name, _ in network.named_parameters()] == [n for n in names if n not in gone]
    assert all(
        isinstance(parameter, ServedWeight)
        for name, parameter in network.named_parameters()
        if name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight", "router.weight"))
    )


@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [0, 5, 0, 0], [1, 0, 3, 9]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_with_few_rows_and_none(dtype: torch.dtype, counts: list[int]) -> None:
    network = make_network(dtype)
    moe = network.layers[1].ffn
    assert isinstance(moe, MoE)
    experts = moe.experts.to(dtype).requires_grad_(False)
    rows_RD = make_rows(sum(counts)).to(dtype)
    expected = experts(rows_RD, counts)
    found = PackedExperts(experts, dtype)(rows_RD, counts)
    assert found.dtype == dtype
    close = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(found, expected, rtol=close, atol=close * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mapped_experts_stay_where_they_lie(dtype: torch.dtype) -> None:
    network = make_network(dtype)
    moe = network.layers[1].ffn
    assert isinstance(moe, MoE)
    moe.experts = moe.experts.to(dtype).requires_grad_(False)
    place, rows_RD, counts = moe.experts.up_weight.data_ptr(), make_rows(13).to(dtype), [1, 0, 3, 9]
    expected = moe.experts(rows_RD, counts)
    pack(network, experts=False)
    served = isinstance(moe.experts, ServedExperts)
    assert served == (dtype == torch.bfloat16 and kernels() is not None)
    first = moe.experts.up[0] if isinstance(moe.experts, ServedExperts) else moe.experts.up_weight
    assert first.data_ptr() == place
    found = moe.experts(rows_RD, counts)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(found, expected, rtol=close, atol=close * 4)
    if served:
        alone = [moe.experts(rows_RD[4 + row : 5 + row], [0, 0, 0, 1]) for row in range(9)]
        assert torch.equal(torch.cat(alone), found[4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_threads_change_no_bit(dtype: torch.dtype) -> None:
    network = make_network(dtype)
    pack(network)
    qkv = network.layers[0].attention.qkv
    x = make_rows(200).to(dtype)
    with torch.inference_mode():
        expected = qkv(x)
        threads = torch.get_num_threads()
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for rows in (2, 3, 4, 5, 6, 7, 9, 33, 64, 65, 127, 200):
                assert torch.equal(qkv(x[:rows]), expected[:rows])
        torch.set_num_threads(threads)


def test_float64_is_not_packed() -> None:
    network = make_network(torch.float64)
    assert not pack(network)
    assert not isinstance(network.layers[0].attention.qkv.weight, ServedWeight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_any_number_of_rows_have_few_numbers(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN keeps a kernel for each number that it meets."""
    network = make_network(dtype)
    pack(network)
    qkv, met, own = network.layers[0].attention.qkv, set[int](), PackedWeight._of_many
    if not isinstance(qkv.weight, PackedWeight):
        pytest.skip("this machine has no products of its own in that type")

    def noted(self: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        met.add(x.numel() // x.shape[-1])
        return own(self, x, bias)

    monkeypatch.setattr(PackedWeight, "_of_many", noted)
    for rows in range(1, 600):
        found = _kernel_rows(rows, dtype)
        assert rows <= found <= max(MIN_ROWS[dtype], rows + 3, rows * 17 / 16)
    with torch.inference_mode():
        for rows in (*range(1, 66), 199, 200):
            assert qkv(make_rows(rows).to(dtype)).shape == (rows, 3 * SPEC.d_model)
    assert len(met) <= 19
