"""The kernel for weights in 8 bits: as near as 16 bits of x allow, on every shape."""

import pytest
import torch
from torch import Tensor

from gptmoe.generate.kernels.eight_bits import EightBits, eight_bits
from gptmoe.generate.kernels.library import kernels
from gptmoe.generate.quantized import Quantized, quantized

SHAPES = [(768, 768), (3072, 768), (768, 3072), (5001, 128), (65, 64), (3, 4)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(outputs: int, inputs: int) -> tuple[EightBits, Tensor]:
    """The kernel's form, and what it stands for; skips where there is no kernel."""
    numbers = torch.Generator().manual_seed(outputs)
    value_OI = torch.randint(-127, 128, (outputs, inputs), generator=numbers, dtype=torch.int8)
    scale_O = torch.rand(outputs, generator=numbers).bfloat16()
    held = eight_bits(value_OI, scale_O)
    if held is None:
        pytest.skip("this machine has no compiler, or its CPU does not multiply bytes")
    return held, value_OI.double() * scale_O.double().unsqueeze(1)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_are_those_of_the_rounded_weight(
    outputs: int, inputs: int, rows: int, has_bias: bool
) -> None:
    held, weight_OI = weight_of(outputs, inputs)
    x_RI = random(rows, inputs, seed=1).bfloat16()
    x_RI[-1, 0] = 300.0  # the others have fewer bits than without it
    bias_O = random(outputs, seed=2).bfloat16() if has_bias else None
    found_RO = held.product(x_RI, bias_O)
    exact_RO = x_RI.double() @ weight_OI.t() + (0 if bias_O is None else bias_O.double())
    half_unit_R1 = x_RI.double().abs().amax(1, keepdim=True) / 32767 / 2
    allowed_RO = half_unit_R1 * weight_OI.abs().sum(1) + exact_RO.abs() * 2**-8 + 1e-5
    assert found_RO.shape == exact_RO.shape
    assert bool(((found_RO.double() - exact_RO).abs() <= allowed_RO).all())
    typical = float((found_RO.double() - exact_RO)[:-1].abs().mean()) if rows > 1 else 0.0
    assert typical <= 2**-8 * float(exact_RO.abs().mean())


def test_rows_of_zeros_and_no_rows() -> None:
    held, _ = weight_of(128, 64)
    bias_O = random(128).bfloat16()
    assert torch.equal(held.product(torch.zeros(1, 64).bfloat16(), bias_O)[0], bias_O)
    assert held.product(torch.zeros(2, 0, 64).bfloat16(), bias_O).shape == (2, 0, 128)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(wrong: float) -> None:
    held, _ = weight_of(128, 64)
    x_RI = random(3, 64).bfloat16()
    expected_RO = held.product(x_RI)
    x_RI[1, 5] = wrong
    found_RO = held.product(x_RI)
    assert not bool(found_RO[1].isfinite().any())
    assert torch.equal(found_RO[::2], expected_RO[::2])


def test_without_a_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, x_RI = random(96, 64), random(2, 64).bfloat16()
    ours = quantized(weight_OI, "int8", torch.bfloat16)
    monkeypatch.setattr("shutil.which", lambda name: None)
    kernels.cache_clear()
    try:
        plain = quantized(weight_OI, "int8", torch.bfloat16)
    finally:
        kernels.cache_clear()
    assert isinstance(plain, Quantized)
    assert torch.allclose(plain.product(x_RI), ours.product(x_RI), rtol=0.02, atol=0.02)
