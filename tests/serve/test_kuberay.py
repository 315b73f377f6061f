"""The files for KubeRay, against its schemas, Ray Serve's and our own."""

import copy
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._common.utils import import_attr
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from gptmoe.config import load
from serve import app, launch
from tests.kuberay_crds import RAY_JOB, RAY_SERVICE
from train.config import TrainConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "kuberay"
SCHEMAS = {"rayjob-train.yaml": RAY_JOB, "rayservice.yaml": RAY_SERVICE}


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return found


@pytest.fixture
def service() -> dict[str, Any]:
    spec: dict[str, Any] = read("rayservice.yaml")["spec"]
    return spec


@pytest.fixture
def serving(service: dict[str, Any]) -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))


def cluster_of(name: str) -> dict[str, Any]:
    spec = read(name)["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    return found


def test_every_file_here_is_checked() -> None:
    assert {path.name for path in FOLDER.glob("*.yaml")} == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_file_follows_kuberays_schema(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])
    jsonschema.validate(read(name), SCHEMAS[name])


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_refuses_what_is_wrong(name: str) -> None:
    """A misspelt field, a number where text is meant, and a missing one."""
    spec = "rayClusterSpec" if name.startswith("rayjob") else "rayClusterConfig"

    def refused(*path: str | int, value: Any) -> bool:
        wrong = copy.deepcopy(read(name))
        place = wrong["spec"][spec]
        for key in path[:-1]:
            place = place[key]
        if value is None:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        validator = jsonschema.Draft202012Validator(SCHEMAS[name])
        return not validator.is_valid(wrong)

    assert refused("headGroupSpecs", value={})
    assert refused("headGroupSpec", "rayStartParams", "num-cpus", value=0)
    assert refused("workerGroupSpecs", 0, "groupName", value=None)
    container = ("workerGroupSpecs", 0, "template", "spec", "containers", 0)
    assert refused(*container, "resources", "limits", "memory", value="16 GB")
    assert refused(*container, "volumeMount", value=[])


@pytest.mark.parametrize("name", SCHEMAS)
def test_clusters_run_the_ray_that_is_tested(name: str) -> None:
    cluster = cluster_of(name)
    assert cluster["rayVersion"] == version("ray")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    assert len({container["image"] for pod in pods for container in pod["containers"]}) == 1
    for pod in pods:
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_training_command_is_one() -> None:
    module, kind, config, *overrides = training_words()
    assert (module, kind) == ("train", "pretrain")
    found = load(TrainConfig, ROOT / Path(config).relative_to("/opt/gptmoe"), overrides)
    assert str(found.run.dir) == "/data/runs/poetry"
    (workers,) = cluster_of("rayjob-train.yaml")["workerGroupSpecs"]
    assert workers["replicas"] == found.parallel.ep == 2


def training_words() -> list[str]:
    python, flag, *words = shlex.split(read("rayjob-train.yaml")["spec"]["entrypoint"])
    assert (python, flag) == ("python", "-m")
    return words


def test_the_service_has_grpc_with_our_services(serving: ServeDeploySchema) -> None:
    assert serving.grpc_options.port == 9000
    assert serving.grpc_options.grpc_servicer_functions == [launch.SERVICER]
    assert callable(import_attr(launch.SERVICER))
    assert (serving.http_options.host, serving.http_options.port) == ("0.0.0.0", 8000)
    assert serving.proxy_location == "EveryNode"


def test_ports_agree(service: dict[str, Any], serving: ServeDeploySchema) -> None:
    wanted = {"serve": serving.http_options.port, "grpc": serving.grpc_options.port}
    ports = service["serveService"]["spec"]["ports"]
    assert {port["name"]: port["targetPort"] for port in ports} == wanted
    cluster = service["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        found = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert found.items() >= wanted.items()


def test_the_application_can_be_built(
    service: dict[str, Any], serving: ServeDeploySchema, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray Serve does it, but for the checkpoint, which is not here."""
    monkeypatch.setattr(app, "pinned", lambda location: location)
    (application,) = serving.applications
    builder = import_attr(application.import_path)
    built = call_user_app_builder_with_args_if_necessary(builder, application.args)
    deployment = built._bound_deployment
    (config, num_cpus) = deployment.init_args
    assert config.name == application.name == "gptmoe"
    assert config.log.access
    assert not config.log.prompts
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)

    (workers,) = service["rayClusterConfig"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    (container,) = pod["containers"]
    assert num_cpus == config.threads == int(container["resources"]["limits"]["cpu"])
    assert workers["maxReplicas"] == scaling.max_replicas
    assert pod["terminationGracePeriodSeconds"] > config.health.drain_s
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert str(config.checkpoint).startswith(tuple(mounts))
