"""The kernels for weights in few bits: as near as 16 bits of x allow, on every shape."""

import pytest
import torch
from torch import Tensor

from gptmoe.generate.kernels.few_bits import FewBits, few_bits
from gptmoe.generate.kernels.library import kernels
from gptmoe.generate.quantized import Quantized, Weights, quantized

SHAPES = [(768, 768), (3072, 768), (768, 3072), (5001, 128), (65, 64), (3, 32)]
GROUPS = {8: 10**6, 4: 32}
LARGEST = {8: 127, 4: 8}
each_width = pytest.mark.parametrize("bits", GROUPS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(outputs: int, inputs: int, bits: int) -> tuple[FewBits, Tensor]:
    """The kernel's form, and what it stands for; skips where there is no kernel."""
    numbers = torch.Generator().manual_seed(outputs)
    group, most = min(inputs, GROUPS[bits]), 2 ** (bits - 1)
    shape = outputs, inputs // group, group
    value_OGI = torch.randint(-LARGEST[bits], most, shape, generator=numbers, dtype=torch.int16)
    scale_OG = torch.rand(shape[:2], generator=numbers).bfloat16()
    held = few_bits(value_OGI.flatten(1), scale_OG, bits)
    if held is None:
        pytest.skip("this machine has no compiler, or its CPU does not multiply bytes")
    return held, (value_OGI.double() * scale_OG.double().unsqueeze(2)).flatten(1)


@each_width
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_are_those_of_the_rounded_weight(
    bits: int, outputs: int, inputs: int, rows: int, has_bias: bool
) -> None:
    held, weight_OI = weight_of(outputs, inputs, bits)
    x_RI = random(rows, inputs, seed=1).bfloat16()
    x_RI[-1, 0] = 300.0  # the others have fewer bits than without it
    bias_O = random(outputs, seed=2).bfloat16() if has_bias else None
    found_RO = held.product(x_RI, bias_O)
    exact_RO = x_RI.double() @ weight_OI.t() + (0 if bias_O is None else bias_O.double())
    half_unit_R1 = x_RI.double().abs().amax(1, keepdim=True) / 32639 / 2
    allowed_RO = half_unit_R1 * weight_OI.abs().sum(1) + exact_RO.abs() * 2**-8 + 1e-5
    assert found_RO.shape == exact_RO.shape
    assert bool(((found_RO.double() - exact_RO).abs() <= allowed_RO).all())
    typical = float((found_RO.double() - exact_RO)[:-1].abs().mean()) if rows > 1 else 0.0
    assert typical <= 2**-8 * float(exact_RO.abs().mean())


@each_width
def test_the_largest_sums_do_not_overflow(bits: int) -> None:
    most = LARGEST[bits]
    value_OI = torch.full((64, 8192), -most, dtype=torch.int16)
    group = min(8192, GROUPS[bits])
    held = few_bits(value_OI, torch.ones(64, 8192 // group), bits)
    if held is None:
        pytest.skip("this machine has no compiler, or its CPU does not multiply bytes")
    for sign in (1, -1):
        found_RO = held.product(torch.full((1, 8192), sign * 2.0).bfloat16())
        assert torch.equal(found_RO, torch.full((1, 64), -sign * 2.0 * most * 8192).bfloat16())


@each_width
def test_rows_of_zeros_and_no_rows(bits: int) -> None:
    held, _ = weight_of(128, 64, bits)
    bias_O = random(128).bfloat16()
    assert torch.equal(held.product(torch.zeros(1, 64).bfloat16(), bias_O)[0], bias_O)
    assert held.product(torch.zeros(2, 0, 64).bfloat16(), bias_O).shape == (2, 0, 128)


@each_width
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(bits: int, wrong: float) -> None:
    held, _ = weight_of(128, 64, bits)
    x_RI = random(3, 64).bfloat16()
    expected_RO = held.product(x_RI)
    x_RI[1, 5] = wrong
    found_RO = held.product(x_RI)
    assert not bool(found_RO[1].isfinite().any())
    assert torch.equal(found_RO[::2], expected_RO[::2])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_without_a_compiler_torch_computes(kind: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, x_RI = random(96, 64), random(2, 64).bfloat16()
    ours = quantized(weight_OI, kind, torch.bfloat16)
    monkeypatch.setattr("shutil.which", lambda name: None)
    kernels.cache_clear()
    try:
        plain = quantized(weight_OI, kind, torch.bfloat16)
    finally:
        kernels.cache_clear()
    assert isinstance(plain, Quantized)
    assert torch.allclose(plain.product(x_RI), ours.product(x_RI), rtol=0.02, atol=0.03)


@each_width
def test_a_row_of_the_least_numbers_is_one_of_zeros(bits: int) -> None:
    """Times what makes the largest of them a whole number of 16 bits none would be finite."""
    held, _ = weight_of(128, 64, bits)
    assert not held.product(torch.full((1, 64), 1e-38).bfloat16()).any()
