"""A product asked for by several threads at once, and on other numbers of the kernel's threads."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor


def check_callers_and_threads(
    product: Callable[[Tensor], Tensor], x_RI: Tensor, expected_RO: Tensor
) -> None:
    """Assert that all get the same bits."""
    found: list[Tensor] = []

    def ask() -> None:
        found.extend(product(x_RI) for _ in range(20))

    callers = [threading.Thread(target=ask) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 60
    assert all(torch.equal(one_RO, expected_RO) for one_RO in found)
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(product(x_RI), expected_RO)
    finally:
        torch.set_num_threads(threads)
