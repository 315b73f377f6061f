"""cluster.provenance: a name for the code that this process runs."""

from pathlib import Path

import pytest

from cluster import env
from cluster.provenance import PACKAGES, code_digest


def test_the_digest_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = code_digest()
    assert here == code_digest()
    assert len(here) == 12
    for package in PACKAGES:
        (tmp_path / package).mkdir()
    file = tmp_path / "train" / "loop.py"
    file.write_text("a = 1")
    monkeypatch.setattr(env, "ROOT", tmp_path)
    before = code_digest()
    file.write_text("a = 2")
    assert code_digest() != before
    file.rename(file.with_name("pool.py"))
    assert code_digest() != before
