"""A whole study in this process: what it leaves behind, pauses, goes on, and refuses."""

import json
import math
from pathlib import Path

import pytest

from gptmoe.checkpoint import open_checkpoint
from gptmoe.config import load
from gptmoe.errors import ClusterError, ConfigError, DataError
from gptmoe.metrics import read
from gptmoe.text import load_tokenizer
from tests.train.study.conftest import TINY, Configure, InProcess, run_study
from train import ledger
from train.state import claimed
from train.study.__main__ import dry_run, main
from train.study.config import StudyConfig
from train.study.corpus import evenly
from train.study.order import read_done
from train.study.publish import draw


def finals(folder: Path) -> dict[str, float]:
    return {run.name: (read_done(run) or {})["loss"] for run in (folder / "runs").iterdir()}


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["lm_loss"]) for r in read(run / "metrics.jsonl") if "lm_loss" in r]


ARMS = ["dense-seed-0", "switch-4-seed-0", "s_base-4-seed-0", "expert_choice-4-seed-0"]


def test_a_study_leaves_a_page_and_its_numbers(configure: Configure) -> None:
    config = configure("study.speed_steps=3")
    launcher = InProcess()
    assert run_study(config, launcher)
    folder = config.study.dir
    assert launcher.started[:4] == ARMS
    assert sorted(finals(folder)) == sorted(ARMS)
    text = (folder / "page.md").read_text(encoding="utf-8")
    assert "| 4 | thresholds cost expert_choice-4 at most 0.01 nats" in text
    assert "| s_base-4, 50 iterations |" in text
    assert (folder / "curves.json").is_file()
    assert json.loads((folder / "results.json").read_text())["missing"] == []
    steps = json.loads((folder / "progress.json").read_text())
    assert (steps["steps"], steps["max_steps"]) == (24, 24)


def test_arms_see_the_same_samples_and_are_judged_causally(configure: Configure) -> None:
    config = configure('study.arms=["dense","expert_choice"]')
    assert run_study(config, InProcess())
    runs = config.study.dir / "runs"
    pages = [ledger.read(runs / name) for name in ("dense-seed-0", "expert_choice-4-seed-0")]
    assert pages[0] == pages[1]
    ledger.check(pages[0], 8)
    done = read_done(runs / "expert_choice-4-seed-0")
    assert done is not None
    assert done["loss"] != done["acausal_loss"]
    assert math.isclose(done["loss"], done["acausal_loss"], abs_tol=0.1)
    assert [layer["layer"] for layer in done["load"]] == [1]
    assert 0 < done["load"][0]["experts_per_token"] < 4
    assert "load" not in (read_done(runs / "dense-seed-0") or {})


def test_a_paused_study_goes_on_with_the_same_numbers(configure: Configure, tmp_path: Path) -> None:
    whole = configure('study.arms=["dense","expert_choice"]', f"study.dir={tmp_path / 'whole'}")
    assert run_study(whole, InProcess())
    config = configure('study.arms=["dense","expert_choice"]')
    assert not run_study(config, InProcess(stop_after_steps=3))
    begun = {run.name: read_done(run) for run in (config.study.dir / "runs").iterdir()}
    assert begun == {"dense-seed-0": None, "expert_choice-4-seed-0": None}
    assert not (config.study.dir / "page.md").exists()
    assert run_study(config, InProcess())
    assert finals(config.study.dir) == finals(whole.study.dir)
    for name in ("dense-seed-0", "expert_choice-4-seed-0"):
        mine, its = (folder / "runs" / name for folder in (config.study.dir, whole.study.dir))
        assert losses(mine) == losses(its)


def test_a_paused_arm_in_float16_keeps_its_loss_scale(configure: Configure) -> None:
    config = configure('study.arms=["dense"]', "train.dtype=float16")
    assert not run_study(config, InProcess(stop_after_steps=3))
    progress = open_checkpoint(config.study.dir / "runs" / ARMS[0]).progress
    assert (progress["step"], progress["samples"]) == (3, 24)
    assert progress["loss_scale"]["clean_steps"] == 3
    assert run_study(config, InProcess())


def test_what_is_finished_is_not_done_again_and_not_changed(configure: Configure) -> None:
    two, three = 'study.arms=["dense","switch"]', 'study.arms=["dense","switch","s_base"]'
    assert run_study(configure(two), InProcess())
    more = InProcess()
    assert run_study(configure(three), more)
    assert more.started == ["s_base-4-seed-0"]
    again = InProcess()
    assert run_study(configure(three), again)
    assert again.started == []
    with pytest.raises(DataError, match=r"dense-seed-0 holds a finished run with other settings"):
        run_study(configure(two, "train.max_steps=8"), InProcess())
    with pytest.raises(ConfigError, match=r"began with data.validation_fraction=0.1, now it is"):
        run_study(configure(two, "data.validation_fraction=0.2"), InProcess())


def test_an_arm_that_fails_is_named_and_the_others_are_on_the_page(configure: Configure) -> None:
    config = configure(
        'study.arms=["dense","switch"]',
        'overrides.switch=["schedule.learning_rate=1e30", "schedule.warmup_steps=0"]',
    )
    with pytest.raises(
        ClusterError, match=r"1 runs of the study failed \(switch-4-seed-0: training diverged"
    ):
        run_study(config, InProcess())
    text = (config.study.dir / "page.md").read_text(encoding="utf-8")
    assert "Not finished, and not on this page:** switch-4, seed 0." in text


def test_a_corpus_that_is_missing(configure: Configure) -> None:
    config = configure('data.inputs=["/nowhere/poems.tsv"]')
    with pytest.raises(DataError, match=r"/nowhere/poems.tsv does not exist; check the path"):
        run_study(config, InProcess())


def test_a_tokenizer_is_learned_where_none_is_given(tmp_path: Path) -> None:
    poems, file = tmp_path / "poems.txt", tmp_path / "own.toml"
    lines = ["春风又绿江南岸，明月何时照我还。", "白日依山尽，黄河入海流。"]
    poems.write_text("\n\n".join(lines * 40), encoding="utf-8")
    text = TINY.read_text(encoding="utf-8").replace("../corpus/poems.tsv", str(poems))
    text = text.replace('tokenizer = "../corpus/tokenizer.json"', "vocab_size = 300")
    file.write_text(text, encoding="utf-8")
    few = ('study.arms=["dense"]', "study.seeds=[0]", "study.speed_steps=0")
    config = load(StudyConfig, file, [*few, f"study.dir={tmp_path / 'study'}"])
    assert run_study(config, InProcess())
    assert load_tokenizer(tmp_path / "study" / "tokenizer").vocab_size <= 300


def test_documents_are_taken_evenly(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(f"第{n}首诗。" for n in range(10)), encoding="utf-8")
    assert list(evenly([file], 25)) == [f"第{n}首诗。" for n in (0, 2, 4, 6, 8)]
    assert len(list(evenly([file], 1000))) == 10


def test_a_dry_run_prints_sizes_and_writes_nothing(configure: Configure) -> None:
    config = configure()
    text = dry_run(config)
    assert "| expert_choice-4 | " in text
    assert "4 arms x 1 seeds: 6,144 tokens" in text
    plain = json.loads(dry_run(config, as_json=True))
    assert [arm["d_ff"] for arm in plain["arms"]] == [128, 128, 128, 84]
    assert plain["estimated_s"] > 0
    assert not config.study.dir.exists()


def test_a_wrong_config_is_one_sentence(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(tmp_path / "none.toml")]) == 2
    assert "failed: config file" in capfd.readouterr().err


def test_a_folder_that_is_taken_is_named_by_its_key(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with claimed(tmp_path):
        assert main([str(TINY), f"study.dir={tmp_path}"]) == 2
    assert "choose another study.dir" in capfd.readouterr().err


def test_damaged_files_are_named(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "done.json").write_text("{")
    with pytest.raises(DataError, match=r"done.json cannot be read .*the arm is judged anew"):
        read_done(tmp_path)
    config = configure()
    config.study.dir.mkdir()
    (config.study.dir / "corpus.json").write_text("{")
    with pytest.raises(DataError, match=r"corpus.json cannot be read .*remove the study's folder"):
        run_study(config, InProcess())


def test_a_figure_that_cannot_be_drawn_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw(tmp_path)  # where there are no curves
    assert "curves.png was not drawn (FileNotFoundError" in caplog.text
    assert f"python -m train.study.figure {tmp_path}" in caplog.text
