"""Norms and GELU in bfloat16: as exact as that allows, each row and number by itself."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptmoe.generate.kernels.library import kernels
from gptmoe.generate.kernels.rows import RowNorm, gelu_, norm_task, use_row_norms
from gptmoe.model.layers import LayerNorm

from .callers import check_callers_and_threads

pytestmark = pytest.mark.skipif(kernels() is None, reason="no C compiler (cc) is installed")
HALF_A_UNIT = 2**-8
"""What rounding to bfloat16 may change, relative to the number."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm_of(width: int) -> RowNorm:
    norm = LayerNorm(width)
    norm.weight.data, norm.bias.data = random(width, seed=1), random(width, seed=2)
    assert use_row_norms(norm, width)
    assert isinstance(norm, RowNorm)
    return norm.requires_grad_(False)


@pytest.mark.parametrize("width", [16, 48, 768])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 0.0), (1e3, -500.0)])
def test_a_norm_is_that_of_float64_rounded(width: int, scale: float, offset: float) -> None:
    norm, x = norm_of(width), (random(3, 5, width) * scale + offset).bfloat16()
    exact = F.layer_norm(x.double(), (width,), norm.weight.double(), norm.bias.double(), 1e-5)
    found = norm(x).double()
    assert ((found - exact).abs() <= exact.abs() * HALF_A_UNIT + 2e-5).all()


def test_a_norm_of_a_sum_is_the_norm_of_the_rounded_sum() -> None:
    compiled, norm = kernels(), norm_of(96)
    assert compiled is not None
    x_RD, added_RD = random(7, 96).bfloat16(), random(7, 96, seed=5).bfloat16()
    sum_RD, out_RD = torch.empty_like(x_RD), torch.empty_like(x_RD)
    task = norm_task(norm, x_RD, out_RD, added_RD)
    task.sum = sum_RD.data_ptr()
    compiled.run("norm", task)
    assert torch.equal(sum_RD, x_RD + added_RD)
    assert torch.equal(out_RD, norm(x_RD + added_RD))
    out_RD.zero_()
    task.out = None
    compiled.run("norm", task)
    assert not out_RD.any(), "only the sum was wanted"


def test_rows_and_threads_change_no_bit_of_a_norm() -> None:
    norm, x_RD = norm_of(64), random(1030, 64).bfloat16()
    expected_RD = norm(x_RD)
    for rows in (0, 1, 2, 3, 8, 513):
        assert torch.equal(norm(x_RD[:rows]), expected_RD[:rows])
    assert torch.equal(norm(x_RD[:, None].expand(-1, 2, -1))[:, 1], expected_RD)
    check_callers_and_threads(norm, x_RD, expected_RD)


def test_gelu_of_every_number() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite() & (every.abs() < 1e6)]
    x = every.double()
    # x (1 + tanh u) / 2 = x / (1 + e^-2u), which does not cancel for negative x
    exact = x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    assert torch.allclose(exact, F.gelu(x, approximate="tanh"), rtol=0, atol=1e-14)
    found = gelu_(every.clone()).double()
    least = x.abs() * 2**-125 + 2**-133  # where the exponential ends, and bfloat16
    assert ((found - exact).abs() <= exact.abs() * HALF_A_UNIT * 1.01 + least).all()
    assert gelu_(torch.tensor([torch.nan]).bfloat16()).isnan().all()


def test_gelu_in_float32() -> None:
    x = torch.cat((torch.linspace(-20, 20, 40_001), random(10_000)))
    exact = F.gelu(x.double(), approximate="tanh")
    assert ((gelu_(x.clone()).double() - exact).abs() <= x.double().abs() * 2e-7).all()
    assert gelu_(torch.tensor([torch.nan])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_neighbours_and_threads_change_no_bit_of_gelu(dtype: torch.dtype) -> None:
    x = random(70_001).to(dtype)
    expected = gelu_(x.clone())
    for count in (0, 1, 7, 8, 17, 511, 512, 513, 4097):
        assert torch.equal(gelu_(x[:count].clone()), expected[:count])
    check_callers_and_threads(lambda numbers: gelu_(numbers.clone()), x, expected)


@pytest.mark.parametrize("x", [random(5).double(), random(6, 4).bfloat16().t()])
def test_torch_computes_gelu_where_the_kernel_cannot(x: Tensor) -> None:
    assert torch.equal(gelu_(x), F.gelu(x, approximate="tanh"))


def test_widths_that_fill_no_instruction_keep_torchs_norm() -> None:
    norm = LayerNorm(24)
    assert use_row_norms(norm, 24) is None
    assert type(norm) is LayerNorm


@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0x7F800001])
def test_what_is_no_number_stays_none(bits: int) -> None:
    """Rounding must not carry it over to a zero: damaged memory is full of such bits."""
    norm = norm_of(64)
    norm.weight.view(torch.int32)[5] = bits
    found = norm(random(3, 64).bfloat16())
    assert found[:, 5].isnan().all()
    assert int(found.isnan().sum()) == 3


def test_gelu_of_numbers_far_below_zero_is_zero() -> None:
    x = torch.tensor([-1e30, -1e38, -3e38]).repeat(32).bfloat16()
    gelu_(x)
    assert not x.any()
