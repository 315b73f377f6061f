"""gptmoe.model.turns: computations that pause for each other."""

from gptmoe.model.turns import Pausing, in_turns, straight

Notes = list[str]


def count(name: str, to: int, notes: Notes) -> Pausing[int]:
    for number in range(to):
        notes.append(f"{name}{number}")
        yield
    return to


def test_they_take_turns_at_their_pauses_and_keep_their_order() -> None:
    notes: Notes = []
    assert in_turns([count("a", 3, notes), count("b", 1, notes), count("c", 2, notes)]) == [3, 1, 2]
    assert notes == ["a0", "b0", "c0", "a1", "c1", "a2"]


def test_one_alone_runs_straight_through() -> None:
    notes: Notes = []
    assert straight(count("a", 2, notes)) == 2
    assert notes == ["a0", "a1"]
    assert in_turns([]) == []
