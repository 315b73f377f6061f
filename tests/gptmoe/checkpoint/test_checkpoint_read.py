"""Reading: any box, whatever layout wrote it; damage is named."""

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptmoe.checkpoint import Box, Piece, cut, newest_valid, open_checkpoint, save, whole
from gptmoe.checkpoint.manifest import read_manifest
from gptmoe.config import digest
from gptmoe.errors import CheckpointError

EXPERTS = torch.randn(8, 6, 4)
NORM = torch.randn(6, dtype=torch.bfloat16)
LAYOUTS = {
    "one": [Box.whole(EXPERTS.shape)],
    "ep2": [Box.whole(EXPERTS.shape).cut(0, rank, 2) for rank in range(2)],
    "ep2-tp2": [
        Box.whole(EXPERTS.shape).cut(0, ep, 2).cut(1, tp, 2) for ep in range(2) for tp in range(2)
    ],
}


@pytest.fixture
def folder(tmp_path: Path, save_in_ranks: Callable) -> Path:
    """A checkpoint of two ranks that own four experts each."""
    return save_by("ep2", tmp_path, save_in_ranks)


def save_by(layout: str, tmp_path: Path, save_in_ranks: Callable) -> Path:
    pieces = [cut("experts", EXPERTS, box) for box in LAYOUTS[layout]]
    parts = [{"weights": [piece], "optimizer": [moment(piece)]} for piece in pieces]
    parts[-1]["weights"].append(whole("norm", NORM))
    assert not any(save_in_ranks(tmp_path / "step-00000020", parts))
    return tmp_path / "step-00000020"


def moment(piece: Piece) -> Piece:
    return Piece(f"exp_avg/{piece.name}", piece.full_shape, piece.box, piece.tensor.double() * 2)


def save_alone(folder: Path, pieces: list[Piece]) -> None:
    groups = {"weights": pieces}
    save(folder, rank=0, world=1, barrier=lambda: None, groups=groups, config={}, progress={})


def flip_a_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_reads_what_any_layout_wrote(
    tmp_path: Path, save_in_ranks: Callable, layout: str
) -> None:
    saved = open_checkpoint(save_by(layout, tmp_path, save_in_ranks))
    assert set(saved.names()) == {"experts", "norm"}
    assert saved.names("optimizer") == ["exp_avg/experts"]
    assert saved.names("nothing") == []
    assert (saved.shape("experts"), saved.dtype("norm")) == ((8, 6, 4), torch.bfloat16)
    for boxes in LAYOUTS.values():
        for box in boxes:
            assert saved.read("experts", box).equal(cut("experts", EXPERTS, box).tensor)
    assert saved.read("experts").equal(EXPERTS)
    assert saved.read("norm").equal(NORM)
    assert saved.read("exp_avg/experts", group="optimizer").equal(EXPERTS.double() * 2)


def test_a_box_across_all_pieces(folder: Path) -> None:
    found = open_checkpoint(folder).read("experts", Box((3, 2, 1), (2, 2, 3)))
    assert found.equal(EXPERTS[3:5, 2:4, 1:4])
    assert found.is_contiguous()


def test_a_part_of_one_piece_is_contiguous_too(tmp_path: Path) -> None:
    save_alone(tmp_path / "a", [whole("experts", EXPERTS)])
    found = open_checkpoint(tmp_path / "a").read("experts", Box((1, 0, 1), (3, 6, 2)))
    assert found.equal(EXPERTS[1:4, :, 1:3])
    assert found.is_contiguous()


def test_an_open_checkpoint_can_be_sent_to_another_process(folder: Path) -> None:
    assert pickle.loads(pickle.dumps(open_checkpoint(folder))).read("experts").equal(EXPERTS)


def test_what_is_read_is_ones_own(folder: Path) -> None:
    saved = open_checkpoint(folder)
    saved.read("experts").zero_()
    assert saved.read("experts").equal(EXPERTS)
    assert open_checkpoint(folder).read("experts").equal(EXPERTS)


@st.composite
def partitions(draw: st.DrawFn, box: Box) -> list[Box]:
    """Random guillotine cuts of a box into disjoint boxes that cover it."""
    sides = [dim for dim, size in enumerate(box.shape) if size > 1]
    if not sides or draw(st.integers(0, 3)) == 0:
        return [box]
    dim = draw(st.sampled_from(sides))
    first, stop = box.start[dim], box.stop[dim]
    middle = draw(st.integers(first + 1, stop - 1))
    halves = box.narrow(dim, first, middle), box.narrow(dim, middle, stop)
    return [part for half in halves for part in draw(partitions(half))]


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data(), st.lists(st.integers(1, 5), max_size=3).map(tuple))
def test_random_partitions_read_back(
    tmp_path: Path, save_in_ranks: Callable, data: st.DataObject, shape: tuple[int, ...]
) -> None:
    values = torch.randn(shape)
    boxes = data.draw(partitions(Box.whole(shape)))
    parts: list[dict[str, list[Piece]]] = [{"weights": []} for _ in range(3)]
    for box in boxes:
        parts[data.draw(st.integers(0, 2))]["weights"].append(cut("values", values, box))
    folder = tmp_path / "random"
    assert save_in_ranks(folder, parts) == [None, None, None]
    saved = open_checkpoint(folder)
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in shape]
    wanted = Box(tuple(low for low, _ in bounds), tuple(high - low for low, high in bounds))
    assert saved.read("values").equal(values)
    assert saved.read("values", wanted).equal(values[wanted.slices(Box.whole(shape))])


def resident_file_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


def test_only_the_wanted_bytes_are_read(tmp_path: Path) -> None:
    big = torch.randn(64, 1 << 18)  # 64 MiB, an expert is 1 MiB
    save_alone(tmp_path / "a", [whole("experts", big)])
    saved, before = open_checkpoint(tmp_path / "a", verify=False), resident_file_bytes()
    part = saved.read("experts", Box((40, 0), (1, 1 << 18)))
    assert part.sum() == big[40].sum()
    assert resident_file_bytes() - before < 4 << 20


def test_a_missing_file_is_named(folder: Path) -> None:
    for path in sorted(folder.glob("weights-*")):
        content = path.read_bytes()
        path.unlink()
        wanted = rf"{path.name} is missing from .*; use an older checkpoint or copy it again"
        with pytest.raises(CheckpointError, match=wanted):
            open_checkpoint(folder, verify=False)
        path.write_bytes(content)
    open_checkpoint(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = next(folder.glob("optimizer-*"))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=rf"{path.name} in .* has {size - 8} of {size} bytes"):
        open_checkpoint(folder, verify=False)


def test_one_flipped_bit_is_found_in_every_file(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for position in (0, len(content) // 2, len(content) - 1):
            flip_a_bit(path, position)
            with pytest.raises(CheckpointError, match=rf"{path.name} in .* is corrupt: its"):
                open_checkpoint(folder)
            path.write_bytes(content)
    open_checkpoint(folder)


def test_a_file_that_cannot_be_opened_is_named(folder: Path) -> None:
    path = next(folder.glob("weights-*"))
    path.unlink()
    path.symlink_to(path)
    wanted = rf"{path.name} in .* cannot be read: Too many levels of symbolic links; use an older"
    with pytest.raises(CheckpointError, match=wanted):
        open_checkpoint(folder)


def test_damage_that_was_not_looked_for_is_named_when_it_is_met(folder: Path) -> None:
    path = sorted(folder.glob("weights-*"))[0]
    flip_a_bit(path, 7)  # the length of the header
    saved = open_checkpoint(folder, verify=False)
    with pytest.raises(
        CheckpointError, match=rf"{path.name} in .* cannot be read: .*; use an older"
    ):
        saved.read("experts")


def test_a_config_that_is_not_json_is_named(folder: Path) -> None:
    flip_a_bit(folder / "config.json", 0)
    with pytest.raises(CheckpointError, match=r"config.json in .* is corrupt: it is not JSON"):
        open_checkpoint(folder, verify=False)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"digest": "x"}', '{"a": 1'])
def test_a_manifest_that_is_none_is_corrupt(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(
        CheckpointError, match=r"manifest.json in .* is corrupt: its digest does not"
    ):
        open_checkpoint(folder)


def test_a_manifest_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"manifest.json in .* is corrupt"):
        open_checkpoint(folder)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("manifest.json")
    with pytest.raises(
        CheckpointError, match=r"manifest.json in .* cannot be read: Too many levels"
    ):
        read_manifest(folder / "manifest.json")


def test_a_later_format_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    plain = json.loads(path.read_text())
    plain["version"] = plain.pop("digest") and 2
    path.write_text(json.dumps({"digest": digest(plain), **plain}))
    with pytest.raises(CheckpointError, match="has checkpoint format 2, this gptmoe reads up to 1"):
        open_checkpoint(folder)


def test_names_that_are_not_there_get_the_nearest(folder: Path) -> None:
    saved = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="no tensor expert in its weights; nearest: experts"):
        saved.read("expert")
    with pytest.raises(
        CheckpointError, match="no tensor zzz in its optimizer; nearest: exp_avg/exp"
    ):
        saved.shape("zzz", "optimizer")
    with pytest.raises(CheckpointError, match="holds no scaler; it holds weights, optimizer"):
        saved.read("scale", group="scaler")
    groups = {**saved.manifest.groups, "optimizer": {}}
    bare = replace(saved, manifest=replace(saved.manifest, groups=groups))
    with pytest.raises(CheckpointError, match=r"holds no optimizer; it holds weights$"):
        bare.read("exp_avg/expert", group="optimizer")


def test_a_box_outside_the_tensor_is_refused(folder: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"box \[0:9, 0:6, 0:4\] does not lie in experts \[8, 6"
    ):
        open_checkpoint(folder).read("experts", Box((0, 0, 0), (9, 6, 4)))


def test_the_newest_valid_one_passes_over_the_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20, 30):
        save_alone(tmp_path / f"step-{step:08d}", [whole("step", torch.tensor(step))])
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000040.tmp")
    flip_a_bit(tmp_path / "step-00000020" / "weights-00001-of-00001.safetensors", -1)
    (tmp_path / "step-00000030" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        found = newest_valid(tmp_path)
    assert found
    assert found.read("step") == 10
    assert "step-00000030 is not a complete checkpoint: it has no manifest.json" in caplog.text
    assert "weights-00001-of-00001.safetensors" in caplog.text


def test_no_checkpoint_is_not_an_error_but_only_damaged_ones_are(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "nowhere") is None
    assert newest_valid(tmp_path) is None
    save_alone(tmp_path / "step-00000010", [whole("step", torch.tensor(1))])
    (tmp_path / "step-00000010" / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"all 1 checkpoints in .* are damaged; copy one again"
    ):
        newest_valid(tmp_path)
