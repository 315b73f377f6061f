"""Kernels as one call: in order, each on all threads, as often as wanted."""

import pytest
import torch
from torch import Tensor

from gptmoe.generate.kernels.library import kernels
from gptmoe.generate.kernels.plain import PlainWeight, plain_weight
from gptmoe.generate.kernels.program import Program
from gptmoe.generate.kernels.rows import gelu_
from gptmoe.generate.kernels.tasks import Gelu
from gptmoe.generate.kernels.workspace import Workspace

from .callers import check_callers_and_threads

pytestmark = pytest.mark.skipif(kernels() is None, reason="no C compiler (cc) is installed")
WIDTH, ROWS = 256, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def weight() -> PlainWeight:
    found = plain_weight(random(WIDTH, WIDTH, seed=1) / 16)
    assert found is not None
    return found


class Chain:
    """A program that takes x through a product and GELU, again and again."""

    def __init__(self, held: PlainWeight, times: int) -> None:
        compiled = kernels()
        assert compiled is not None
        self.program, self.bias = Program(compiled), random(WIDTH, seed=2)
        self.buffers = [torch.empty(ROWS, WIDTH, dtype=torch.bfloat16) for _ in range(times + 1)]
        for x, out in zip(self.buffers, self.buffers[1:], strict=False):
            self.program.add_product(held, x, out, self.bias)
            self.program.add("gelu", Gelu(x=out.data_ptr(), count=out.numel()))

    def __call__(self, x: Tensor) -> Tensor:
        self.buffers[0].copy_(x)
        self.program.run()
        return self.buffers[-1].clone()


def expected(held: PlainWeight, x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = gelu_(held.product(x, random(WIDTH, seed=2)))
    return x


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_program_gives_the_bits_of_its_kernels_and_can_run_again(threads: int) -> None:
    held = weight()
    chain, before = Chain(held, 6), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for seed in range(20):
            x = random(ROWS, WIDTH, seed=seed)
            assert torch.equal(chain(x), expected(held, x, 6))
    finally:
        torch.set_num_threads(before)


def test_programs_of_several_threads_do_not_meet() -> None:
    held, x = weight(), random(ROWS, WIDTH)
    check_callers_and_threads(lambda x_RI: Chain(held, 4)(x_RI), x, expected(held, x, 4))


def test_a_program_grows_between_its_runs() -> None:
    held, x = weight(), random(ROWS, WIDTH)
    chain = Chain(held, 1)
    once = chain(x)
    chain.program.add("gelu", Gelu(x=chain.buffers[-1].data_ptr(), count=ROWS * WIDTH))
    assert torch.equal(chain(x), gelu_(once))


def test_scratch_memory_is_shared_and_stays_where_it_was_promised() -> None:
    compiled = kernels()
    assert compiled is not None
    workspace = Workspace()
    first, second = Program(compiled, workspace), Program(compiled, workspace)
    small = first.scratch(100)
    assert len(small) >= 100
    assert second.scratch(90).data_ptr() == small.data_ptr()
    large = second.scratch(len(small) + 1)
    assert len(large) > len(small)
    assert first.scratch(8).data_ptr() == large.data_ptr()
    assert Program(compiled).scratch(8).data_ptr() != large.data_ptr()
