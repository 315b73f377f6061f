"""What Ray Serve's controller is given when an operator changes something, without a cluster."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import DeploymentID
from ray.serve._private.deploy_utils import deploy_args_to_deployment_info
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.generated import serve_pb2 as untyped

from serve.app import build
from serve.config import ReplicasConfig, ServeConfig
from serve.controller import Controlled, Settings, State

serve_pb2: Any = untyped
CHANGED = Settings(checkpoint="/b", version=1)


def state(wanted: int) -> State:
    settings = Settings(checkpoint="/a")
    return State(
        settings=settings, status="RUNNING", message="", states={}, wanted=wanted,
        scales_itself=True,
    )  # fmt: skip


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> DeploymentInfo:
    """What the controller has; `_ask` gets it."""
    here = SimpleNamespace(get_job_id=lambda: "01000000")
    monkeypatch.setattr("ray.get_runtime_context", lambda: here)
    config = ServeConfig(checkpoint=Path("/a"), replicas=ReplicasConfig(min=1, max=8, initial=2))
    made = build(config, num_cpus=1)._bound_deployment
    info = DeploymentInfo(
        made._deployment_config, made._replica_config, start_time_ms=0, deployer_job_id=""
    )
    route = serve_pb2.DeploymentRoute(deployment_info=info.to_proto(), route="/")
    monkeypatch.setattr("serve.controller._ask", lambda *_: route.SerializeToString())
    return info


def again(wanted: int) -> DeploymentInfo:
    """What the controller makes of what `change` gives it."""
    data = Controlled("poems")._as_it_is("Generator", state(wanted), CHANGED)
    found = serve_pb2.DeploymentArgs.FromString(data)
    return deploy_args_to_deployment_info(
        found.deployment_name, found.deployment_config, found.replica_config, found.deployer_job_id
    )


def test_a_change_leaves_the_replicas_that_the_load_has_brought(deployed: DeploymentInfo) -> None:
    """Ray Serve begins a changed config with its initial_replicas, if it has any."""
    scaled = DeploymentAutoscalingState(DeploymentID("Generator", "poems"))
    assert scaled.register(deployed, 0) == 2
    changed = again(wanted=5)
    assert changed.config_changed(deployed)
    assert scaled.register(changed, 5) == 5
    before, after = (info.deployment_config for info in (deployed, changed))
    assert after.user_config == {"checkpoint": "/b", "version": 1, "restart": False} | {
        "draining": False
    }
    kept = after.autoscaling_config
    assert kept == before.autoscaling_config.model_copy(update={"initial_replicas": None})
    assert kept.policy.get_policy()(**kept.policy.policy_kwargs)
