"""Free memory, as a machine and a container tell it."""

from pathlib import Path

import pytest

from gptmoe.memory import available_bytes, give_back

KIB = 1024


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("max", 1000 * KIB),
        (str(900 * KIB), 600 * KIB),
        (str(9000 * KIB), 1000 * KIB),
        (str(200 * KIB), 0),
        (None, 1000 * KIB),
    ],
)
def test_the_lower_of_machine_and_container(
    tmp_path: Path, limit: str | None, expected: int
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4000 kB\nMemAvailable:   1000 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.stat").write_text(f"anon {300 * KIB}\nfile {500 * KIB}\n")
    if limit:
        (group / "memory.max").write_text(f"{limit}\n")
    assert available_bytes(tmp_path) == expected


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None


def test_giving_back_is_left_out_where_the_allocator_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    class Library:
        def __init__(self, name: None) -> None:
            asked.append("opened")

        def __getattr__(self, name: str) -> None:
            raise AttributeError(name)

    give_back()
    monkeypatch.setattr("gptmoe.memory.ctypes.CDLL", Library)
    give_back()
    assert asked == ["opened"]
