"""The noise of sampling: a pure function of seed, index and position."""

import hashlib
import struct
from collections import Counter
from typing import Any

import pytest

from gptmoe.generate.sampling import uniform


def test_the_noise_is_a_function_of_seed_index_and_position() -> None:
    places = [(s, i, p) for s in range(-6, 6) for i in range(8) for p in range(40)]
    noise = [uniform(*place) for place in places]
    assert noise == [uniform(*place) for place in reversed(places)][::-1]
    assert len(set(noise)) == len(noise)
    assert all(0 <= number < 1 for number in noise)


def test_the_noise_is_what_it_says() -> None:
    digest = hashlib.sha256(struct.pack("<qq", -1, 5)).digest()
    assert uniform(-1, 0, 5) == (int.from_bytes(digest[:8], "little") >> 11) / 2**53
    assert uniform(-1, 0, 5) == 0.29612717467258776
    digest = hashlib.sha256(struct.pack("<qqq", -1, 5, 3)).digest()
    assert uniform(-1, 3, 5) == (int.from_bytes(digest[:8], "little") >> 11) / 2**53


@pytest.mark.parametrize("along", ["seed", "index", "position"])
def test_the_noise_is_uniform_whatever_moves(along: str) -> None:
    """Chi-square over 64 bins, and over 8 x 8 for neighbours. Fixed inputs: always the same."""
    count = 16_384
    at: dict[str, Any] = {"seed": 11, "index": 2, "position": 7}
    noise = [uniform(**at | {along: number}) for number in range(count)]
    single = Counter(int(number * 64) for number in noise)
    pairs = Counter((int(a * 8), int(b * 8)) for a, b in zip(noise[::2], noise[1::2], strict=True))
    for bins, total in ((single, count), (pairs, count // 2)):
        expected = total / 64
        chi_square = sum((n - expected) ** 2 / expected for n in bins.values())
        assert len(bins) == 64
        assert 30 < chi_square < 115  # 63 degrees of freedom: one in 10,000 beyond either
