"""What is set for Ray, DeepSpeed and the maths libraries, and when a token is used."""

import sys
from pathlib import Path

import pytest

from cluster import env


@pytest.fixture(autouse=True)
def no_ray_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_defaults_are_set_and_the_users_choice_stays() -> None:
    environment = {"RAY_USAGE_STATS_ENABLED": "1"}
    env.prepare(environment)
    assert environment["RAY_USAGE_STATS_ENABLED"] == "1"
    assert environment["RAY_TRAIN_ENABLE_STATE_TRACKING"] == "1"
    assert ("DS_ACCELERATOR" in environment) is not env.has_gpu()


def test_whoever_has_a_token_sends_it(tmp_path: Path) -> None:
    def mode(environment: dict[str, str]) -> str | None:
        env.prepare(environment)
        return environment.get("RAY_AUTH_MODE")

    assert mode({}) is None
    assert mode({"RAY_AUTH_TOKEN": "secret"}) == "token"
    assert mode({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "nothing")}) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert mode({}) == "token"
    assert mode({"RAY_AUTH_MODE": "disabled"}) == "disabled"


def test_the_token_mode_is_not_touched_once_ray_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", sys)
    environment = {"RAY_AUTH_TOKEN": "secret"}
    env.prepare(environment)
    assert "RAY_AUTH_MODE" not in environment


def test_a_child_finds_our_packages_and_may_start_a_cluster() -> None:
    child = env.child_environment({"PYTHONPATH": "/a:/b"}, starts_cluster=True)
    assert child["PYTHONPATH"] == f"{env.ROOT}:/a:/b"
    assert child["RAY_AUTH_MODE"] == "token"
    assert child["RAY_health_check_period_ms"] == "500"
    chosen = env.child_environment({"RAY_health_check_period_ms": "9"}, starts_cluster=True)
    assert chosen["RAY_health_check_period_ms"] == "9"
    assert "RAY_AUTH_MODE" not in env.child_environment({}, starts_cluster=False)
    assert not env.take_attached(child)  # whoever starts one so need not hold its standard input


def test_workers_get_their_threads() -> None:
    worker = env.worker_environment(3, use_gpu=False, environment={})
    assert (worker["OMP_NUM_THREADS"], worker["DS_ACCELERATOR"]) == ("3", "cpu")
    assert worker["PYTHONPATH"] == str(env.ROOT)
    assert worker["CUDA_VISIBLE_DEVICES"] == ""
    own = env.worker_environment(3, use_gpu=True, environment={})
    assert not {"DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"} & own.keys()


def test_what_enters_at_a_door_reaches_the_replica() -> None:
    """A replica takes what Ray Serve's proxies and the edge take, and they take its answers."""
    process: dict[str, str] = {}
    env.prepare(process)
    limit = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"
    for environment in (process, env.replica_environment(), env.edge_environment()):
        assert int(environment[limit]) == 2**31 - 1
    assert process["RAY_SERVE_PROXY_USE_GRPC"] == "1"
    assert int(process["RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"]) == 32 * 2**20
    assert env.edge_environment()["RAY_SERVE_USE_GRPC_BY_DEFAULT"] == "1"


def test_inside_a_job() -> None:
    assert not env.inside_job({"RAY_ADDRESS": "http://head:8265"})
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"metadata": {"job_submission_id": "pretrain-1"}}'}
    assert env.inside_job(job)
    assert (env.job_id(job), env.job_id({})) == ("pretrain-1", "")


def test_nobody_else_reads_rays_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    env.protect_token({})  # there is none
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    env.protect_token({"RAY_AUTH_TOKEN_PATH": str(token)})
    assert token.stat().st_mode & 0o777 == 0o644, "somebody shares it"
    env.protect_token({})
    assert (token.stat().st_mode & 0o777, token.read_text()) == (0o600, "secret")
