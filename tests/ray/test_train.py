"""python -m train on Ray Train: the numbers of a run without Ray, whatever its processes suffer.

The fixtures are one story: a run of two workers that share the experts ends, is extended, killed,
started again and told to stop; another is finetuned from it until it cannot save.
"""

import dataclasses
import json
import re
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import requests
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gptmoe
from cluster import env, local, runs, topology_file
from gptmoe import metrics
from gptmoe.checkpoint import latest, open_checkpoint
from gptmoe.config import load
from gptmoe.parallel.updater import MOMENTS
from tests.ranks.pool import RankPool
from tests.ray.command import WITHIN_S, Command, Ended, losses, newest_step
from tests.train.alone import run_alone, run_rank
from train.config import TrainConfig
from train.launch import say_if_busy
from train.plan import RunPlan, make_plan
from train.recorders import RayRecorder

TINY = env.ROOT / "configs" / "train" / "tiny.toml"
SHORT = 12
EP2 = ("parallel.ep=2", "train.validate_every_steps=5", "checkpoint.every_steps=8")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "试 跑"


@pytest.fixture(scope="module")
def ended(run_dir: Path) -> Ended:
    """The run's first part, to its end."""
    words = ["pretrain", str(TINY), *EP2, f"run.dir={run_dir}", f"train.max_steps={SHORT}"]
    return Command(run_dir.parent, *words).end()


@pytest.fixture(scope="module")
def plan(run_dir: Path, ended: Ended, tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    """The same run, to be done elsewhere without Ray."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    words = [*EP2, f"run.dir={folder}", f"train.max_steps={SHORT}", "data.workers=0"]
    words.append(f"data.path={run_dir / 'data'}")
    return make_plan("pretrain", load(TrainConfig, TINY, words))


@pytest.fixture(scope="module")
def alone(plan: RunPlan) -> list[dict[str, float]]:
    """Its numbers in one process."""
    return run_alone(plan)


def validations(records: list[dict[str, float]]) -> dict[float, tuple[float, float]]:
    return {r["step"]: (r["val_loss"], r["bits_per_char"]) for r in records if "val_loss" in r}


def test_a_run_ends_quietly_and_says_so(ended: Ended, run_dir: Path) -> None:
    assert ended.code == 0, ended.stderr
    assert ended.stdout == ""
    assert all(" | " in line for line in ended.stderr.splitlines()), ended.stderr
    assert ended.last_line.endswith(f"{run_dir} starts, to step {SHORT}")
    state = json.loads((run_dir / "state.json").read_text(encoding="utf-8"))
    assert (state["state"], state["max_steps"], state["job_id"]) == ("finished", SHORT, "")
    assert re.fullmatch(r"http://127.0.0.1:\d+", state["dashboard_url"])
    assert state["cluster_address"]
    shown = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    assert shown == open_checkpoint(run_dir).config


def test_two_workers_learn_what_one_process_learns(
    ended: Ended, run_dir: Path, alone: list[dict[str, float]]
) -> None:
    records = metrics.read(run_dir / "metrics.jsonl")
    assert list(losses(records)) == list(range(1, SHORT + 1))
    assert losses(records) == pytest.approx(losses(alone), rel=1e-5)
    assert list(validations(records)) == list(validations(alone))
    for step, values in validations(alone).items():
        assert validations(records)[step] == pytest.approx(values, rel=1e-5)
    for ours, theirs in zip(records, alone, strict=True):
        for name in ("expert_load", "tokens", "samples", "epoch", "learning_rate"):
            assert ours.get(name) == theirs.get(name)


def test_the_folder_says_who_owned_which_experts(ended: Ended, run_dir: Path) -> None:
    topology = topology_file.read(run_dir)
    assert topology is not None
    assert topology.run == make_name(run_dir)
    assert [(owner.worker, owner.step) for owner in topology.owners] == [
        ("train-0", SHORT),
        ("train-1", SHORT),
    ]
    experts = [
        [(part.layer, part.first, part.end) for part in owner.shard.experts]
        for owner in topology.owners
    ]
    assert experts == [[(1, 0, 6), (3, 0, 6)], [(1, 6, 12), (3, 6, 12)]]
    assert len({owner.pid for owner in topology.owners}) == 2


def make_name(run_dir: Path) -> str:
    config = load(TrainConfig, TINY, [*EP2, f"run.dir={run_dir}"])
    return make_plan("pretrain", config).run_name


def test_its_curves_are_there_for_tensorboard(ended: Ended, run_dir: Path) -> None:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("loss")] == list(range(1, SHORT + 1))
    assert {"bits_per_char", "expert_load/11"} <= set(events.Tags()["scalars"])


def test_what_two_workers_saved_one_process_loads(
    run_dir: Path, plan: RunPlan, alone: list[dict[str, float]]
) -> None:
    names = {path.name for path in latest(run_dir).iterdir()}
    assert {"weights-00001-of-00002.safetensors", "weights-00002-of-00002.safetensors"} <= names
    stored = open_checkpoint(run_dir)
    assert stored.progress == {"step": SHORT, "samples": SHORT * 48}
    moments = {f"{kind}/{name}" for kind in (*MOMENTS, "step") for name in stored.names()}
    assert set(stored.names("optimizer")) == moments
    ours, theirs = gptmoe.load(run_dir), gptmoe.load(plan.run_dir)
    tokens = [ours.tokenizer.encode("春风又绿江南岸")]
    torch.testing.assert_close(ours.logits(tokens), theirs.logits(tokens), rtol=1e-3, atol=1e-3)
    assert ours.generate("明月", max_new_tokens=4, temperature=0)


LONG = ("train.max_steps=100000", "checkpoint.keep=1")


@pytest.fixture(scope="module")
def killed(run_dir: Path, ended: Ended) -> Ended:
    """The run extended, and all processes of the command killed at once, in midst of it."""
    command = Command(run_dir.parent, "pretrain", str(TINY), *EP2, *LONG, f"run.dir={run_dir}")
    command.wait_until(lambda: newest_step(run_dir) > SHORT + 8)
    return command.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def stopped(run_dir: Path, killed: Ended) -> Ended:
    """The run started again at once, and told to stop after some steps."""
    path = run_dir / "metrics.jsonl"
    before = path.stat().st_ino
    command = Command(run_dir.parent, "pretrain", str(TINY), *EP2, *LONG, f"run.dir={run_dir}")
    command.wait_until(lambda: path.stat().st_ino != before)  # cut, by replacing it
    start = newest_step(run_dir)
    command.wait_until(lambda: newest_step(run_dir) > start + 4)
    command.send(signal.SIGTERM)
    command.wait_until(lambda: runs.read_state(run_dir).state == "interrupted")
    assert command.is_running()  # it says so at once: a job that is stopped has 3 s to live
    return command.end()


def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(
    stopped: Ended, run_dir: Path, plan: RunPlan, tmp_path: Path
) -> None:
    assert stopped.code == 130
    assert stopped.last_line.startswith("interrupted: start the same command again")
    assert stopped.seconds < 60
    state = runs.read_state(run_dir)
    assert (state.state, state.max_steps) == ("interrupted", 100000)

    records = metrics.read(run_dir / "metrics.jsonl")
    last = int(records[-1]["step"])
    assert list(losses(records)) == list(range(1, last + 1))
    assert last > SHORT + 8
    with RankPool(2) as pool:  # the same layout, one run, never interrupted
        whole, _ = pool.run(
            2,
            run_rank,
            dataclasses.replace(plan, run_dir=tmp_path / "whole", max_steps=last),
            limit_s=WITHIN_S,
        )
    assert losses(records) == losses(whole)  # to the last bit
    common = validations(records).keys() & validations(whole).keys() - {SHORT, last}
    assert len(common) >= 4
    assert all(validations(records)[step] == validations(whole)[step] for step in common)
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    points = [point.step for point in events.Scalars("loss")]
    assert points == list(range(1, len(points) + 1))
    assert last - len(points) in (0, 1), "it may have been ended between one file and the other"


@pytest.fixture(scope="module")
def finetuned(run_dir: Path, stopped: Ended, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on questions and answers from the last checkpoint; its third save will fail."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = [
        {"question": f"{a}加{b}等于几？", "answer": f"{a + b}。"}
        for a in range(20)
        for b in (1, 2, 3)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "sums.jsonl").write_text(text, encoding="utf-8")
    (folder / "tune.toml").write_text(
        f"""
        run.dir = "{folder / "run"}"
        model.checkpoint = "{run_dir}"
        router.group_sequences = 2
        parallel.ep = 2
        data.path = "sums.jsonl"
        data.columns = {{ src_txt = "question", tgt_txt = "answer" }}
        data.seq_len = 32
        data.validation_fraction = 0.1
        train.max_steps = 12
        train.batch_tokens = 512
        train.microbatch_size = 4
        schedule.learning_rate = 3e-3
        checkpoint.every_steps = 4
        """,
        encoding="utf-8",
    )
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "checkpoints" / "step-00000012.tmp").write_text("in the way")
    return folder


def test_finetuning_learns_the_answers_until_a_worker_cannot_save(finetuned: Path) -> None:
    run = finetuned / "run"
    done = Command(finetuned, "finetune", str(finetuned / "tune.toml")).end()
    assert done.code == 2
    assert "Traceback" not in done.stderr
    sentence = (
        f"checkpoint {run / 'checkpoints' / 'step-00000012'} was not saved: Not a directory; "
        "earlier ones are untouched"
    )
    assert done.last_line == f"failed: {sentence}"
    state = json.loads((run / "state.json").read_text(encoding="utf-8"))
    assert (state["state"], state["message"]) == ("failed", sentence)

    records = metrics.read(run / "metrics.jsonl")
    assert list(losses(records)) == list(range(1, 13))
    assert losses(records)[12] < losses(records)[1] - 1.0
    assert open_checkpoint(run).progress["step"] == 8
    model = gptmoe.load(run)
    assert model.config["kind"] == "finetune"
    assert model.spec.max_seq_len == 128
    assert model.generate("1加2等于几？", max_new_tokens=4, temperature=0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[local.Session]:
    with local.session(workers=1) as session:
        yield session


def test_numbers_reach_prometheus(cluster: local.Session) -> None:
    RayRecorder("tiny-1f2e3d").record(7, loss=2.5, expert_load=[1, 2])
    node: Mapping[str, Any] = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline_s = time.monotonic() + 60
    while not (found := re.findall(r"ray_gptmoe_train_(?:loss|step)\{.*", scrape(url))):
        assert time.monotonic() < deadline_s
        time.sleep(0.5)
    assert all('run="tiny-1f2e3d"' in line for line in found)
    assert sorted(line.rpartition(" ")[2] for line in found) == ["2.5", "7.0"]


class Idler:
    """Somebody else's work."""

    def is_there(self) -> bool:
        return True


def test_a_busy_cluster_is_named_before_the_wait(
    cluster: local.Session, caplog: pytest.LogCaptureFixture
) -> None:
    say_if_busy(cluster, workers=1)
    assert caplog.messages == []
    cpus = ray.cluster_resources()["CPU"]
    idler: Any = ray.remote(Idler).options(num_cpus=cpus).remote()
    assert ray.get(idler.is_there.remote(), timeout=60)
    deadline_s = time.monotonic() + 60
    while not caplog.messages:  # the cluster learns of it within a second
        say_if_busy(cluster, workers=1)
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert caplog.messages[0] == (
        "the cluster is busy, it lacks 1 of 1 CPU now: training waits until it is free"
    )


def scrape(url: str) -> str:
    try:
        return requests.get(url, timeout=5).text
    except requests.ConnectionError:
        return ""
