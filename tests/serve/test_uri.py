"""A checkpoint behind a URI: one for all replicas, fetched where each of them runs."""

import pickle
from pathlib import Path

import pytest

from gptmoe.config import Uri
from serve.checkpoints import pinned
from serve.command import _parser, read_config
from serve.config import ServeConfig
from serve.core import on_this_node
from tests.bucket import serving


def test_a_replica_fetches_the_checkpoint_that_was_chosen_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = tmp_path / "there" / "run" / "checkpoints" / "step-00000004"
    newest.mkdir(parents=True)
    (newest / "manifest.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with serving(tmp_path / "there", monkeypatch) as bucket:
        options = _parser().parse_intermixed_args(["--checkpoint", bucket.uri("run")])
        checkpoint = pinned(read_config(options).checkpoint)
        assert checkpoint == Uri(bucket.uri("run/checkpoints/step-00000004"))
        config = pickle.loads(pickle.dumps(ServeConfig(checkpoint=checkpoint)))
        copy = on_this_node(config.checkpoint, config)
    assert copy.is_relative_to(tmp_path / "home" / ".cache" / "gptmoe")
    assert [path.name for path in copy.iterdir()] == ["manifest.json"]


def test_a_folder_is_read_where_it_is(tmp_path: Path) -> None:
    assert on_this_node(tmp_path, ServeConfig(checkpoint=tmp_path)) == tmp_path
