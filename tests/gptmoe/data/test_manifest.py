"""The manifest: what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gptmoe.data import Manifest, open_samples, verify
from gptmoe.errors import DataError

Make = Callable[..., Path]


@pytest.fixture
def folder(make: Make) -> Path:
    return make("a.tsv", "春眠不觉晓\n处处闻啼鸟\n", kind="finetune", validation_fraction=0.1)


def test_a_sound_folder_is_verified(folder: Path) -> None:
    assert verify(folder) == Manifest.load(folder)


def test_a_changed_byte_is_found_by_verifying(folder: Path) -> None:
    path = folder / "validation-rows.bin"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    Manifest.load(folder)
    with pytest.raises(
        DataError, match=r"validation-rows\.bin is corrupt \(its checksum differs\)"
    ):
        verify(folder)


def test_a_cut_or_missing_file_is_found_by_opening(folder: Path) -> None:
    path = folder / "train-tokens.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=rf"bin should have {size} bytes and is {size - 2} bytes"):
        open_samples(folder, "train", 4, 0)
    path.unlink()
    with pytest.raises(DataError, match=r"train-tokens\.bin should have \d+ bytes and is missing"):
        open_samples(folder, "train", 4, 0)


def test_a_folder_without_a_manifest_is_no_prepared_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file", tmp_path / "nothing"):
        with pytest.raises(DataError, match=r"has no manifest\.json; make one with gptmoe data"):
            Manifest.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", "\ud800"])
def test_a_damaged_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(DataError, match=r"manifest\.json is damaged; delete the folder"):
        Manifest.load(folder)


def test_a_manifest_with_a_wrong_value_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    raw = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**raw, "empty_rows": "many"}), "utf-8")
    with pytest.raises(DataError, match=r"damaged \(empty_rows must be a whole number, found 'man"):
        Manifest.load(folder)


def test_another_format_version_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    raw = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**raw, "format_version": 2}), "utf-8")
    with pytest.raises(DataError, match="has data format 2, this version reads 1; delete the fold"):
        Manifest.load(folder)
