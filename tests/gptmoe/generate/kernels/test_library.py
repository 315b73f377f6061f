"""The kernels are compiled once, beside their source, or torch does without them."""

import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gptmoe.generate.kernels import library
from gptmoe.generate.kernels.library import built, kernels

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")


@pytest.fixture
def forgotten() -> Iterator[None]:
    """As in a process that has not asked for the kernels yet; nor does the next."""
    kernels.cache_clear()
    yield
    kernels.cache_clear()


@needs_compiler
def test_compiled_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "built"
    first = built(folder)
    assert first.parent == folder
    assert list(folder.iterdir()) == [first], "no draft is left"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert built(folder) == first


@needs_compiler
def test_another_processor_or_source_is_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = built(tmp_path)
    sources = shutil.copytree(library.SOURCES, tmp_path / "kernels")
    with (sources / "common.h").open("a") as shared:
        shared.write("\n")
    monkeypatch.setattr(library, "SOURCES", sources)
    assert built(tmp_path) != first


@needs_compiler
def test_where_nothing_can_be_written_it_goes_to_a_folder_of_its_own(tmp_path: Path) -> None:
    elsewhere = built(tmp_path / "missing" / "folder")
    assert elsewhere.exists()
    assert not list(tmp_path.iterdir())
    shutil.rmtree(elsewhere.parent)


@needs_compiler
@pytest.mark.usefixtures("forgotten")
def test_what_does_not_compile_is_told_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "attention.c").write_text("int attend(", "utf-8")
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    with pytest.raises(OSError, match=r"cc cannot compile the kernels: .*error"):
        built(tmp_path)
    monkeypatch.setattr(library, "built", lambda: built(tmp_path))
    with caplog.at_level(logging.INFO):
        assert kernels() is None
    assert "cannot compile" in caplog.text
    assert "decoded by torch's own kernels" in caplog.text


@pytest.mark.usefixtures("forgotten")
def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with caplog.at_level(logging.INFO):
        assert kernels() is None
    assert "no C compiler (cc) is installed; bfloat16 is decoded by torch's own" in caplog.text


@pytest.mark.usefixtures("forgotten")
def test_without_gnu_openmp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    with caplog.at_level(logging.INFO):
        assert kernels() is None
    assert "torch has no GNU OpenMP here" in caplog.text
