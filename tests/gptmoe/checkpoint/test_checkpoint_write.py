"""Saving: exactly once, all or nothing, whatever fails."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptmoe.checkpoint import Box, Piece, cut, open_checkpoint, save, whole
from gptmoe.errors import CheckpointError

UP = torch.arange(4 * 3 * 2, dtype=torch.float32).view(4, 3, 2)
HALVES = [cut("up", UP, Box.whole(UP.shape).cut(0, rank, 2)) for rank in range(2)]


def save_alone(folder: Path, pieces: list[Piece], **more: object) -> None:
    arguments = {"config": {}, "progress": {}, "copy_files": None, **more}
    save(folder, rank=0, world=1, barrier=lambda: None, groups={"weights": pieces}, **arguments)


def messages(errors: list[BaseException | None]) -> list[str]:
    assert all(isinstance(error, CheckpointError) for error in errors)
    return [str(error) for error in errors]


@contextmanager
def no_room_for_files_over(size_bytes: int) -> Iterator[None]:
    """Let every write beyond `size_bytes` of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_each_rank_writes_its_own_files(tmp_path: Path, save_in_ranks: Callable) -> None:
    folder = tmp_path / "checkpoints" / "step-00000020"
    step = whole("step/up", torch.tensor(20))
    parts = [
        {"weights": [HALVES[0], whole("norm", torch.ones(2))], "optimizer": []},
        {"weights": [HALVES[1]], "optimizer": [step]},
        {},
    ]
    errors = save_in_ranks(
        folder,
        parts,
        config={"model": {"d_model": 2}},
        progress={"step": 20, "rng": "ÿ=", "samples": 160},
        copy_files=lambda draft: (draft / "tokenizer.json").write_text("{}") and None,
    )
    assert errors == [None, None, None]
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "manifest.json",
        "optimizer-00002-of-00003.safetensors",
        "tokenizer.json",
        "weights-00001-of-00003.safetensors",
        "weights-00002-of-00003.safetensors",
    ]
    assert list(folder.parent.iterdir()) == [folder]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {"manifest.json"}
    saved = open_checkpoint(folder)
    assert saved.progress == {"step": 20, "rng": "ÿ=", "samples": 160}
    assert saved.config == {"model": {"d_model": 2}}
    assert saved.read("up").equal(UP)


def test_the_files_are_plain_safetensors(tmp_path: Path) -> None:
    save_alone(tmp_path / "a", [HALVES[1], HALVES[0], whole("count", torch.tensor([7]))])
    stored = load_file(tmp_path / "a" / "weights-00001-of-00001.safetensors")
    assert set(stored) == {"up[0:2, 0:3, 0:2]", "up[2:4, 0:3, 0:2]", "count"}
    assert stored["up[2:4, 0:3, 0:2]"].equal(UP[2:])


@pytest.mark.parametrize(
    "values",
    [
        torch.randn(3, 5, dtype=torch.float64),
        torch.randn(3, 5, dtype=torch.bfloat16),
        torch.randn(3, 5, dtype=torch.float16),
        torch.tensor(-7),
        torch.tensor([True, False, True]),
        torch.tensor([1, 255], dtype=torch.uint8),
        torch.tensor([float("nan"), float("inf"), -0.0]),
        torch.empty(0, 4),
        torch.randn(4, 6).t()[1:],
        torch.nn.Parameter(torch.randn(2, 2)),
    ],
    ids=lambda values: f"{values.dtype}-{tuple(values.shape)}",
)
def test_type_and_bits_are_kept(tmp_path: Path, values: torch.Tensor) -> None:
    odd = whole("odd", torch.ones(3, dtype=torch.bool))
    save_alone(tmp_path / "a", [odd, whole("values", values)])
    found = open_checkpoint(tmp_path / "a").read("values")
    assert (found.dtype, found.shape) == (values.dtype, values.shape)
    assert found.data_ptr() % values.element_size() == 0
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, values)]
    assert bits[0].equal(bits[1])


def test_a_missing_part_is_named_on_every_rank(tmp_path: Path, save_in_ranks: Callable) -> None:
    errors = save_in_ranks(tmp_path / "a", [{"weights": [HALVES[0]]}, {"weights": []}])
    first, second = messages(errors)
    assert "up [4, 3, 2] is incomplete: no rank handed in [2:4, 0:3, 0:2]" in first
    assert "another rank failed, and rank 0 says why" in second
    assert list(tmp_path.iterdir()) == []


def test_a_replica_handed_in_twice_is_refused(tmp_path: Path, save_in_ranks: Callable) -> None:
    errors = save_in_ranks(tmp_path / "a", [{"weights": HALVES}, {"weights": [HALVES[1]]}])
    assert "up [4, 3, 2] is there twice: two pieces hold [2:4, 0:3, 0:2]" in messages(errors)[0]
    assert list(tmp_path.iterdir()) == []


def test_ranks_must_save_the_same_tensor(tmp_path: Path, save_in_ranks: Callable) -> None:
    half = cut("up", UP.bfloat16(), HALVES[1].box)
    errors = save_in_ranks(tmp_path / "a", [{"weights": [HALVES[0]]}, {"weights": [half]}])
    wanted = "pieces of up disagree: F32 [4, 3, 2] and BF16 [4, 3, 2]; all ranks must save the same"
    assert wanted in messages(errors)[0]


def test_a_type_that_cannot_be_stored_is_named(tmp_path: Path, save_in_ranks: Callable) -> None:
    odd = whole("phase", torch.zeros(2, dtype=torch.complex64))
    errors = save_in_ranks(tmp_path / "a", [{"weights": []}, {"weights": [odd]}])
    first, second = messages(errors)
    assert "rank 1 could not write its part: phase is torch.complex64" in first
    assert "phase is torch.complex64; a checkpoint holds F64, F32" in second
    assert list(tmp_path.iterdir()) == []


def test_progress_must_be_plain_data(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was not saved: Object of type Tensor is not JSON"):
        save_alone(tmp_path / "a", [whole("up", UP)], progress={"rng": UP})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, save_in_ranks: Callable, rank: int
) -> None:
    old, new = tmp_path / "step-00000010", tmp_path / "step-00000020"
    parts = [{"weights": []}, {"weights": []}]
    parts[rank] = {"weights": [whole("big", torch.zeros(1 << 16))]}
    assert save_in_ranks(old, parts) == [None, None]
    with no_room_for_files_over(1 << 16):
        errors = save_in_ranks(new, parts)
    texts = messages(errors)
    assert "step-00000020 was not saved: File too large; earlier ones are untouched" in texts[rank]
    assert "File too large" in texts[0]
    assert list(tmp_path.iterdir()) == [old]
    assert open_checkpoint(old).read("big").shape == (1 << 16,)


def test_a_failed_save_leaves_the_checkpoint_it_was_to_replace(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000010"
    save_alone(folder, [whole("up", UP)], progress={"step": 10})

    def fail(draft: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        save_alone(folder, [whole("up", UP + 1)], copy_files=fail)
    assert open_checkpoint(folder).read("up").equal(UP)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000010"
    save_alone(folder, [whole("up", UP), whole("gone", UP)])
    save_alone(folder, [whole("up", UP + 1)])
    assert open_checkpoint(folder).read("up").equal(UP + 1)
    assert open_checkpoint(folder).names() == ["up"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_cannot_be_made_fails_on_every_rank(
    tmp_path: Path, save_in_ranks: Callable
) -> None:
    (tmp_path / "file").touch()
    errors = save_in_ranks(tmp_path / "file" / "a", [{"weights": HALVES}, {}])
    assert ["Not a directory" in text for text in messages(errors)] == [True, True]


class Crash(BaseException):
    """The end of a process, as far as `save` can see: nothing catches it, nothing is cleaned up."""


@pytest.mark.parametrize("moment", range(4))
def test_a_crash_at_any_meeting_leaves_the_old_checkpoint(tmp_path: Path, moment: int) -> None:
    old, new = tmp_path / "step-00000010", tmp_path / "step-00000020"
    save_alone(old, [whole("up", UP)])
    calls = iter(range(5))

    def crash(draft: Path | None = None) -> None:
        if next(calls) == moment:
            raise Crash

    def save_new(meet: Callable[[], None], copy: Callable[[Path], None]) -> None:
        groups = {"weights": [whole("up", UP + 1)]}
        save(
            new,
            rank=0,
            world=1,
            barrier=meet,
            groups=groups,
            config={},
            progress={},
            copy_files=copy,
        )

    with pytest.raises(Crash):
        save_new(crash, crash)
    committed = moment == 3  # at the last barrier the rename is done
    assert open_checkpoint(tmp_path).path == (new if committed else old)
    assert new.exists() == committed
    save_new(lambda: None, lambda draft: None)
    assert open_checkpoint(tmp_path).read("up").equal(UP + 1)
    assert sorted(tmp_path.iterdir()) == [old, new]


def test_a_kill_in_the_middle_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    code = """
import os, signal, sys, torch
from pathlib import Path
from gptmoe.checkpoint import save, whole

for step, kill in ((10, False), (20, True)):
    save(
        Path(sys.argv[1]) / f"step-{step:08d}", rank=0, world=1, barrier=lambda: None,
        groups={"weights": [whole("up", torch.full((1000,), step))]}, config={}, progress={},
        copy_files=lambda draft: kill and os.kill(os.getpid(), signal.SIGKILL),
    )
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    names = sorted(os.listdir(tmp_path))
    assert names == ["step-00000010", "step-00000020.tmp"]
    assert open_checkpoint(tmp_path).read("up").eq(10).all()
