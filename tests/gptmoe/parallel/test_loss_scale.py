"""gptmoe.parallel.loss_scale: halved by an overflow, doubled after enough clean steps."""

from hypothesis import given
from hypothesis import strategies as st

from gptmoe.parallel.loss_scale import LossScale


def test_an_overflow_halves_it_and_clean_steps_double_it() -> None:
    scale = LossScale(value=1024.0, grow_after=3)
    scale = scale.after(overflow=True)
    assert (scale.value, scale.clean_steps) == (512.0, 0)
    values = []
    for _ in range(7):
        scale = scale.after(overflow=False)
        values.append(scale.value)
    assert values == [512, 512, 1024, 1024, 1024, 2048, 2048]
    assert scale.clean_steps == 1


@given(st.lists(st.booleans(), max_size=200))
def test_it_stays_a_power_of_two_between_its_bounds(overflows: list[bool]) -> None:
    scale = LossScale(grow_after=2)
    for overflow in overflows:
        scale = scale.after(overflow=overflow)
        assert 1 <= scale.value <= 2**24
        assert scale.value.hex().startswith("0x1.0000000000000p")
