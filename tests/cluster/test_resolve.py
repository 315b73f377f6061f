"""Configs of train and serve are checked by a child process."""

from pathlib import Path

import pytest

from cluster import env
from cluster.resolve import resolve, split_words
from gptmoe.errors import ConfigError

TINY = env.ROOT / "configs" / "train" / "tiny.toml"


def test_a_training_config_comes_back_resolved() -> None:
    resolved = resolve("pretrain", TINY, ["parallel.ep=2", "run.dir=some where"])
    assert resolved.workers == 2
    assert resolved.config["run"]["dir"] == "some where"
    assert resolved.config["parallel"]["ep"] == 2


def test_a_serving_config_too(tmp_path: Path) -> None:
    resolved = resolve("serve", None, [f'checkpoint="{tmp_path}"', "replicas.max=3"])
    assert (resolved.workers, resolved.config["checkpoint"]) == (3, str(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel.zeroo=1"], "unknown config key parallel.zeroo; did you mean parallel.zero?"),
        (["train.max_steps=many"], "train.max_steps must be a whole number"),
    ],
)
def test_a_wrong_config_is_one_sentence(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("pretrain", TINY, overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_child_that_breaks_is_not_taken_for_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="could not be checked"):
        resolve("nothing", None, [])


def test_words_are_a_file_and_overrides() -> None:
    assert split_words(["a.toml", "b=1", "c.d=2"]) == (Path("a.toml"), ["b=1", "c.d=2"])
    assert split_words(["b=x.toml"]) == (None, ["b=x.toml"])
    with pytest.raises(ConfigError, match=r"found 2 config files \(a.toml, b.toml\); name one"):
        split_words(["a.toml", "b.toml"])
