"""Jobs on a cluster with token authentication that other processes started, by the real command."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import env, jobs
from gptmoe.errors import ConfigError
from tests.bucket import serving

HEAD = """
import socket, sys
from ray.cluster_utils import Cluster

def free():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

ports = {"dashboard_port": free(), "dashboard_agent_listen_port": free()}
options = {"num_cpus": 2, "include_dashboard": True, "object_store_memory": 100_000_000}
cluster = Cluster(initialize_head=True, head_node_args=options | ports)
print(cluster.address, cluster.webui_url, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
TINY = "configs/train/tiny.toml"


@dataclass(frozen=True)
class Head:
    """A running cluster."""

    address: str
    url: str

    def gptmoe(
        self, *words: str, timeout_s: float = 60.0, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command against this cluster, as a user whose RAY_ADDRESS names another one."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        return subprocess.run(
            [sys.executable, "-m", "cluster.cli", *words, "--address", self.url],
            env=kept | {"RAY_ADDRESS": "http://127.0.0.1:1"} | variables,
            cwd=env.ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    variables = env.child_environment(starts_cluster=True) | {"RAY_AUTH_MODE": "token"}
    command = [sys.executable, "-c", HEAD]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=variables, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        address, url = process.stdout.readline().split()
        yield Head(address, f"http://{url}")
        process.communicate(timeout=60)


def test_a_command_with_an_address_is_a_job_that_is_followed(head: Head, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = ["train.max_steps=2", f"run.dir={run_dir}", "parallel.ep=2"]
    done = head.gptmoe("pretrain", TINY, *overrides, "--json", timeout_s=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 2
    assert "validation loss" in done.stderr

    status = json.loads(head.gptmoe("status", "--json").stdout)
    (job,) = status["jobs"]
    assert job["job_id"].startswith("pretrain-run-")
    assert (job["kind"], job["status"]) == ("pretrain", "SUCCEEDED")
    assert (job["run"]["run_dir"], job["run"]["step"]) == (str(run_dir), 2)
    assert [owner["step"] for owner in job["run"]["topology"]["owners"]] == [2, 2]
    assert status["resources"]["CPU"] == 2

    shown = head.gptmoe("status").stdout
    assert re.search(rf"{job['job_id']} +SUCCEEDED +{run_dir}", shown)
    assert "Running entrypoint" in head.gptmoe("logs", job["job_id"]).stdout


def test_the_runs_of_a_study_are_jobs(head: Head, tmp_path: Path) -> None:
    few = ('study.arms=["dense","switch"]', "study.seeds=[0]", "study.speed_steps=0")
    words = ["study", "routers", "configs/study/tiny.toml", *few]
    refused = head.gptmoe(*words, "study.dir=here")
    assert "study.dir=here is relative, but the jobs run elsewhere" in refused.stderr
    done = head.gptmoe(*words, f"study.dir={tmp_path / 'study'}", "--json", timeout_s=240)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["done"], facts["finished"], facts["missing"]) == (True, 2, [])
    assert (tmp_path / "study" / "page.md").is_file()
    listed = json.loads(head.gptmoe("status", "--json").stdout)["jobs"]
    assert [job["status"] for job in listed if job["kind"] == "study"] == ["SUCCEEDED"] * 2


def test_a_submitted_job_is_stopped(head: Head, tmp_path: Path) -> None:
    run_dir = tmp_path / "long"
    words = ["pretrain", TINY, "train.max_steps=100000", f"run.dir={run_dir}"]
    done = head.gptmoe("submit", *words, "--json")
    assert done.returncode == 0, done.stderr
    job_id = json.loads(done.stdout)["job_id"]
    deadline_s = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists():
        assert time.monotonic() < deadline_s, head.gptmoe("logs", job_id).stdout
        time.sleep(0.5)
    done = head.gptmoe("stop", job_id)
    assert (done.returncode, done.stdout) == (0, f"job {job_id}: STOPPED\n"), done.stderr
    assert head.gptmoe("logs", job_id, "--follow").returncode == 0


def test_a_failing_job_hands_back_its_exit_code(head: Head, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    overrides = [f"run.dir={tmp_path / 'run'}", f"data.path={tmp_path / 'empty.txt'}"]
    done = head.gptmoe("pretrain", TINY, *overrides, timeout_s=120)
    assert done.returncode == 2
    assert "empty.txt is empty" in done.stderr


def test_a_cluster_that_is_too_small_is_refused(head: Head, tmp_path: Path) -> None:
    words = ["pretrain", TINY, "parallel.dp=4", f"run.dir={tmp_path / 'run'}"]
    done = head.gptmoe("submit", *words, "--timeout-s", "0.5")
    assert done.returncode == 2
    assert f"the cluster at {head.url} lacks 2 of 4 CPU for this run (waited 0.5 s)" in done.stderr


def test_without_the_token_the_user_is_told_where_to_get_it(head: Head, tmp_path: Path) -> None:
    done = head.gptmoe("status", HOME=str(tmp_path))
    assert done.returncode == 2
    assert f"the Ray cluster at {head.url} wants its token: copy ~/.ray/auth_token" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_jobs_and_applications_are_named(head: Head) -> None:
    done = head.gptmoe("logs", "no-such-job")
    assert done.returncode == 2
    assert f"{head.url} has no job no-such-job; its jobs: " in done.stderr
    done = head.gptmoe("scale", "2", "--name", "nothing")
    assert done.returncode == 2
    assert f"{head.url} serves no nothing; it serves: none" in done.stderr


SERVE = """
import sys
import ray
import ray.serve
from ray.serve.config import AutoscalingConfig

class Toy:
    async def __call__(self):
        return "here"

ray.init(address=sys.argv[1], log_to_driver=False)
fixed = ray.serve.deployment(Toy, ray_actor_options={"num_cpus": 0}).bind()
scaling = AutoscalingConfig(min_replicas=1, max_replicas=2)
auto = ray.serve.deployment(
    Toy, ray_actor_options={"num_cpus": 0}, autoscaling_config=scaling
).bind()
target = ray.serve.RunTarget
ray.serve.start(http_options={"port": int(sys.argv[2])})
ray.serve.run_many([
    target(fixed, name="toy", route_prefix="/toy", external_scaler_enabled=True),
    target(auto, name="auto", route_prefix="/auto"),
])
"""


def test_replicas_are_scaled(head: Head) -> None:
    subprocess.run(
        [sys.executable, "-c", SERVE, head.address, "0"],
        env=env.child_environment(starts_cluster=True),
        check=True,
        capture_output=True,
        timeout=120,
    )
    done = head.gptmoe("scale", "3", "--name", "toy", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"name": "toy", "replicas": 3}
    served = json.loads(head.gptmoe("status", "--json").stdout)["applications"]
    assert {it["name"]: it["replicas"] for it in served} == {"auto": 1, "toy": 3}

    done = head.gptmoe("scale", "2", "--name", "auto")
    assert done.returncode == 2
    assert "this application scales itself" in done.stderr
    done = head.gptmoe("scale", "9", "--name", "toy", "--timeout-s", "0")
    assert done.returncode == 2
    assert "of 9 replicas of toy run after 0 s; the cluster has 2 CPU" in done.stderr


SILENT = """
import socket, sys
from cluster import env
env.prepare()
from cluster.dashboard import Dashboard
with socket.create_server(("127.0.0.1", 0)) as server:
    Dashboard(f"http://127.0.0.1:{server.getsockname()[1]}", timeout_s=0.5)
"""


def test_a_server_that_says_nothing_is_not_waited_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SILENT], cwd=env.ROOT, capture_output=True, text=True, timeout=30
    )
    assert "does not answer within 0.5 s; look at its head node" in done.stderr


def test_what_a_job_is_told(tmp_path: Path) -> None:
    run_dir = tmp_path / "a"
    job = jobs.make_job("pretrain", env.ROOT / TINY, ["parallel.ep=2", f"run.dir={run_dir}"])
    assert (job.kind, job.run_dir, job.workers) == ("pretrain", str(run_dir), 2)
    assert job.job_id.startswith("pretrain-a-")
    assert f"-m train pretrain {TINY} parallel.ep=2" in job.entrypoint
    assert "'data.path=\"configs/corpus/poems.tsv\"'" in job.entrypoint  # travels along
    assert f"'run.dir=\"{run_dir}\"'" in job.entrypoint

    shared = tmp_path / "poems.tsv"
    shared.write_text("春风")
    words = [f"run.dir={run_dir}", f"data.path={shared}"]
    job = jobs.make_job("pretrain", env.ROOT / TINY, words)
    assert f"'data.path=\"{shared}\"'" in job.entrypoint

    job = jobs.make_job("serve", None, [f"checkpoint={tmp_path}", "name=poems"])
    assert job.job_id.startswith("serve-poems-")
    assert f"-m serve checkpoint={tmp_path}" in job.entrypoint


def test_a_job_is_told_uris_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "poems.tsv").write_text("春风")
    with serving(tmp_path / "there", monkeypatch) as bucket:
        words = [f"run.dir=file://{tmp_path / 'a'}", f"data.path={bucket.uri('poems.tsv')}"]
        job = jobs.make_job("pretrain", env.ROOT / TINY, words)
        assert job.run_dir == str(tmp_path / "a")
        assert f"'run.dir=\"{tmp_path / 'a'}\"'" in job.entrypoint
        assert f"'data.path=\"{bucket.uri('poems.tsv')}\"'" in job.entrypoint
        job = jobs.make_job("serve", None, [f"checkpoint={bucket.uri('poems.tsv')}"])
        assert f"'checkpoint=\"{bucket.uri('poems.tsv')}\"'" in job.entrypoint
        assert bucket.read == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "run.dir=runs/tiny is relative, and a job's own folder is temporary"),
        (["run.dir=/no/where/a"], "run.dir=/no/where/a: /no/where does not exist on this machine"),
        (["run.dir=/tmp/a", "data.path=nope.tsv"], "data.path=nope.tsv does not exist"),
        (["run.dir=/tmp/a", "data.path=../poems.tsv"], "data.path=../poems.tsv is relative, but"),
        (["run.dir=/tmp/a", "parallel.ep=5"], "ep"),
        (["run.dir=s3://bucket/a"], "run.dir begins with s3://, but a run is written to a folder"),
        (["run.dir=/tmp/a", "data.path=mock:///a.tsv"], "data.path: mock:///a.tsv does not exist"),
        (
            ["run.dir=/tmp/a", "model.checkpoint=nosuch://bucket/a"],
            "model.checkpoint: nosuch://bucket/a cannot be reached: ",
        ),
    ],
)
def test_a_job_that_would_not_find_its_files_is_refused(
    overrides: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "poems.tsv").write_text("春风")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match=re.escape(expected)):
        jobs.make_job("pretrain", env.ROOT / TINY, overrides)
