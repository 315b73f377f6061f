"""What Ray Serve's controller knows of an application, and can be told about it.

Ray Serve 2.60 has no public call that changes `user_config` alone: `ray.serve.run` gives the
application a new code version each time, and so restarts every replica. The controller keeps a
replica's process if the code version stays: here an application is deployed again from what the
controller itself has of it, with the few values changed that are to change.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
import ray.exceptions
from ray.serve._private.common import DeploymentID
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.exceptions import ExternalScalerDisabledError
from ray.serve.generated import serve_pb2 as untyped

from gptmoe.errors import ClusterError

from .refusals import NotWithThis

DEPLOYMENT = "Generator"
"""The one with the model."""
ANSWER_WITHIN_S = 20.0

serve_pb2: Any = untyped


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all replicas of an application are told at any time: Ray Serve's `user_config`."""

    checkpoint: str
    """The weights to serve."""
    version: int = 0
    """Of the weights: 0 for those that the application began with."""
    restart: bool = False
    """Texts that were running when this version came begin again."""
    draining: bool = False
    """No new requests are taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """An application, as far as the controller has come."""

    settings: Settings
    status: str
    message: str
    states: Mapping[str, str]
    """Of each replica, by its id: RUNNING, UPDATING, STARTING, STOPPING, ..."""
    wanted: int
    """Replicas."""
    scales_itself: bool
    nodes: Mapping[str, str] = field(default_factory=dict)
    """Each replica's node, by its address."""

    @property
    def running(self) -> int:
        """Replicas that answer."""
        return sum(map(self.runs, self.states))

    def runs(self, replica: str) -> bool:
        """Whether it answers."""
        return self.states[replica] in ("RUNNING", "UPDATING")


class Controlled:
    """One application, of whose deployments one holds the model. Its calls block, and raise
    ClusterError."""

    def __init__(self, application: str) -> None:
        self.name = application

    def state(self) -> State:
        """How the application is now."""
        return self._look()[1]

    def _look(self) -> tuple[list[str], State]:
        """The deployments' names, and how the application is now."""
        applications = _ask("get_serve_instance_details")["applications"]
        found = applications.get(self.name, {"deployments": {}})
        if DEPLOYMENT not in found["deployments"]:
            raise ClusterError(f"Ray Serve has no application {self.name} any more")
        deployment = found["deployments"][DEPLOYMENT]
        return list(found["deployments"]), State(
            settings=Settings(**deployment["deployment_config"]["user_config"]),
            status=found["status"].value,
            message=deployment["message"] or found["message"],
            states={one["replica_id"]: one["state"].value for one in deployment["replicas"]},
            wanted=deployment["target_num_replicas"],
            scales_itself=not found["external_scaler_enabled"],
            nodes={one["replica_id"]: one.get("node_ip", "") for one in deployment["replicas"]},
        )

    def change(self, settings: Settings) -> None:
        """Tell all replicas, also those that start later, without a restart of any.

        Ray Serve tells one after the other; `state` says how far it is.
        """
        names, state = self._look()
        deployments = [self._as_it_is(name, state, settings) for name in names]
        application = serve_pb2.ApplicationArgs(external_scaler_enabled=not state.scales_itself)
        _ask(
            "deploy_applications",
            {self.name: deployments},
            {self.name: application.SerializeToString()},
        )

    def _as_it_is(self, name: str, state: State, settings: Settings) -> bytes:
        """A deployment as the controller has it, but for the settings of the one with the model."""
        route = serve_pb2.DeploymentRoute.FromString(_ask("get_deployment_info", name, self.name))
        info = route.deployment_info
        config = DeploymentConfig.from_proto(info.deployment_config)
        arguments = serve_pb2.DeploymentArgs(
            deployment_name=name,
            replica_config=info.replica_config.SerializeToString(),
            deployer_job_id=ray.get_runtime_context().get_job_id(),
            ingress=name == DEPLOYMENT,
        )
        if name == DEPLOYMENT:
            arguments.route_prefix = route.route
            config.user_config = asdict(settings)
            if config.autoscaling_config is None:
                config.num_replicas = state.wanted  # which `scale` has set beside the config
            else:  # a changed config begins with this number again; without one it goes on
                scaling = config.autoscaling_config
                config.autoscaling_config = scaling.model_copy(update={"initial_replicas": None})
        arguments.deployment_config = config.to_proto_bytes()
        encoded: bytes = arguments.SerializeToString()
        return encoded

    def scale(self, replicas: int) -> None:
        """Set the number of replicas. Raises NotWithThis if the application sets it itself."""
        try:
            _ask("update_deployment_replicas", DeploymentID(DEPLOYMENT, self.name), replicas)
        except ExternalScalerDisabledError:
            raise NotWithThis(
                f"application {self.name} scales itself; serve it with replicas.min = "
                "replicas.max to scale it by hand"
            ) from None


def _ask(method: str, *arguments: Any) -> Any:
    try:
        controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        return ray.get(getattr(controller, method).remote(*arguments), timeout=ANSWER_WITHIN_S)
    except ExternalScalerDisabledError:
        raise
    except (ValueError, ray.exceptions.RayError) as error:
        line = str(error).strip().splitlines()[-1]
        raise ClusterError(f"Ray Serve's controller does not answer: {line}") from error
