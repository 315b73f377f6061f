"""KubeRay's schemas, trimmed to the fields that our files may use, and closed.

Field names, types and what is required are those of the CRDs `rayjobs.ray.io` and
`rayservices.ray.io`, version v1: github.com/ray-project/kuberay, ray-operator/config/crd/bases/,
which are generated from ray-operator/apis/ray/v1/*_types.go. Compared with these files field by
field at the commits 0057210ed5a9 (RayJob, from between the releases 1.4 and 1.5), 007412988d06
(RayService) and 026f143324c0 (RayCluster). The API server drops a field that it does not know; here
it is an error.
"""

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
BOOLEAN: Schema = {"type": "boolean"}
STRINGS: Schema = {"type": "object", "additionalProperties": STRING}
QUANTITY: Schema = {
    "anyOf": [INTEGER, STRING],
    "pattern": r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))"
    r"(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$",
}
DNS_NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}


def closed(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def several(item: Schema) -> Schema:
    return {"type": "array", "items": item}


METADATA = closed(("name",), name=DNS_NAME, namespace=STRING, labels=STRINGS, annotations=STRINGS)
QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}

CONTAINER = closed(
    ("name",),
    name=DNS_NAME,
    image=STRING,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    command=several(STRING),
    args=several(STRING),
    env=several(closed(("name",), name=STRING, value=STRING)),
    ports=several(
        closed(
            ("containerPort",),
            containerPort=INTEGER,
            name={"type": "string", "maxLength": 15},
            protocol=STRING,
        )
    ),
    resources=closed(limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=several(
        closed(
            ("mountPath", "name"), mountPath=STRING, name=STRING, readOnly=BOOLEAN, subPath=STRING
        )
    ),
)

POD = closed(
    ("spec",),
    metadata=closed(labels=STRINGS, annotations=STRINGS),
    spec=closed(
        ("containers",),
        containers=several(CONTAINER),
        volumes=several(
            closed(
                ("name",),
                name=STRING,
                persistentVolumeClaim=closed(("claimName",), claimName=STRING, readOnly=BOOLEAN),
            )
        ),
        nodeSelector=STRINGS,
        terminationGracePeriodSeconds=INTEGER,
    ),
)

RAY_CLUSTER = closed(
    ("headGroupSpec",),
    rayVersion=STRING,
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=closed(
        idleTimeoutSeconds=INTEGER,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        resources=closed(limits=QUANTITIES, requests=QUANTITIES),
    ),
    headGroupSpec=closed(
        ("rayStartParams", "template"), rayStartParams=STRINGS, serviceType=STRING, template=POD
    ),
    workerGroupSpecs=several(
        closed(
            ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
            groupName=STRING,
            replicas=INTEGER,
            minReplicas=INTEGER,
            maxReplicas=INTEGER,
            numOfHosts=INTEGER,
            rayStartParams=STRINGS,
            template=POD,
        )
    ),
)

SERVICE = closed(
    metadata=closed(name=DNS_NAME, labels=STRINGS, annotations=STRINGS),
    spec=closed(
        type={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        ports=several(
            closed(
                ("port",),
                name=STRING,
                port=INTEGER,
                targetPort={"anyOf": [INTEGER, STRING]},
                protocol=STRING,
                appProtocol=STRING,
            )
        ),
    ),
)


def resource(kind: str, spec: Schema) -> Schema:
    return closed(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )


RAY_JOB = resource(
    "RayJob",
    closed(
        activeDeadlineSeconds=INTEGER,
        backoffLimit=INTEGER,
        entrypoint=STRING,
        entrypointNumCpus={"type": "number"},
        runtimeEnvYAML=STRING,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        shutdownAfterJobFinishes=BOOLEAN,
        ttlSecondsAfterFinished=INTEGER,
        metadata=STRINGS,
        rayClusterSpec=RAY_CLUSTER,
    ),
)

RAY_SERVICE = resource(
    "RayService",
    closed(serveConfigV2=STRING, serveService=SERVICE, rayClusterConfig=RAY_CLUSTER),
)
