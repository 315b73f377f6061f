"""The gradient norm, exact however large a tensor is."""

import pytest
import torch

from gptmoe.parallel.mesh import single
from gptmoe.parallel.updater import global_norm


@pytest.mark.parametrize("size", [1, 4095, 4096, 5_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_of_a_large_tensor(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    skewed = torch.randn(size, generator=generator, dtype=dtype) ** 5
    expected = float(skewed.double().norm())
    assert global_norm([skewed], single()) == pytest.approx(expected, rel=3e-7)
    twice = global_norm([skewed.view(-1, 1), skewed], single())
    assert twice == pytest.approx(2**0.5 * expected, rel=3e-7)
