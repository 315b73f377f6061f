"""What `python -m serve` can be told: a TOML file, with overrides, as one frozen ServeConfig."""

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cluster.planner.hot import spans_of
from gptmoe.config import INPUT_PATH, Location
from gptmoe.errors import ConfigError, LayoutError
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.model.spec import ModelSpec
from gptmoe.parallel.layout import smallest_dp
from gptmoe.shard.parts import Part, arrange

from .access_log import LogConfig
from .result_cache import CacheConfig
from .scaling import ScalingConfig

_USUAL_EDGE_PORT = 9443


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicasConfig:
    """How many copies of the model answer. min = max: fixed; else Ray Serve scales between them,
    see ScalingConfig."""

    min: int = 1
    """0: none while nobody asks; the next request waits for one to start."""
    max: int = 1
    initial: int | None = None
    """At the start; not given: min, but at least 1, which shows that the model can be served."""

    def __post_init__(self) -> None:
        if self.min < 0:
            raise ConfigError(f"replicas.min={self.min} must be at least 0")
        if self.max < 1:
            raise ConfigError(f"replicas.max={self.max} must be at least 1")
        if self.max < self.min:
            raise ConfigError(
                f"replicas.max={self.max} is below replicas.min={self.min}; raise or lower one"
            )
        if self.initial is not None and not self.min <= self.initial <= self.max:
            raise ConfigError(
                f"replicas.initial={self.initial} must lie between replicas.min={self.min} "
                f"and replicas.max={self.max}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """When Ray Serve replaces a replica, and how long it waits for requests at the end."""

    period_s: float = 10.0
    """Seconds between two health checks."""
    stall_s: float = 60.0
    """A replica whose engine computes one step for longer is replaced."""
    drain_s: float = 20.0
    """Seconds that running requests get to finish when a replica is removed."""
    start_s: float = 300.0
    """Seconds that the application gets to start: room found, the checkpoint fetched and loaded."""

    def __post_init__(self) -> None:
        for name in ("period_s", "stall_s", "drain_s", "start_s"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise ConfigError(f"health.{name}={value} must be a positive number of seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the shards of one replica share its model; all 1: the replica holds it alone."""

    dp: int = 0
    """Data parallel: shards with different requests. 0: as few as ep needs."""
    tp: int = 1
    """Tensor parallel: slices of each weight."""
    ep: int = 1
    """Expert parallel: shards that together hold one copy of the experts."""
    pp: int = 1
    """Pipeline parallel: stages with different layers."""
    expert_ranks: int = 0
    """Shards a stage that hold its experts and nothing else; 0: those with attention hold them."""
    hot: tuple[str, ...] = ()
    """Experts, as LAYER:NUMBER, that all shards of their stage hold and share the rows of;
    `gptmoe status` proposes some."""

    @property
    def world(self) -> int:
        """Shards of a replica."""
        return self.pp * (self._dp * self.tp + self.expert_ranks)

    def parts(self, spec: ModelSpec) -> tuple[Part, ...]:
        """What each shard owns. Raises LayoutError if they cannot share the model."""
        for span in spans_of(self.hot):
            if span.first >= spec.experts_in_layer(span.layer):
                raise LayoutError(
                    f'parallel.hot="{span.layer}:{span.first}" names no expert of this model; it '
                    f"has MoE layers {spec.moe_layers} with {spec.num_experts} experts"
                )
        return arrange(
            spec,
            dp=self._dp,
            tp=self.tp,
            ep=self.ep,
            pp=self.pp,
            expert_ranks=self.expert_ranks,
            hot=spans_of(self.hot),
        )

    @property
    def _dp(self) -> int:
        return self.dp or (1 if self.expert_ranks else smallest_dp(self.ep, self.tp))

    def __post_init__(self) -> None:
        for name, least in (("dp", 0), ("tp", 1), ("ep", 1), ("pp", 1), ("expert_ranks", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"parallel.{name}={getattr(self, name)} must be at least {least}")
        for word in self.hot:
            if not re.fullmatch(r"\d+:\d+", word):
                raise ConfigError(f'parallel.hot="{word}" must be LAYER:NUMBER, as "1:3"')


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsConfig:
    """When a shard counts as lost, and how long requests wait for it. Only with several shards."""

    silent_s: float = 2.0
    """One that was not heard of for longer, while a step is under way, is replaced."""
    wait_s: float = 30.0
    """Requests wait so long for shards that are away; then they are refused for now."""
    group_timeout_s: float = 10.0
    """The longest that shards wait for each other in a step."""

    def __post_init__(self) -> None:
        for name in ("silent_s", "wait_s", "group_timeout_s"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise ConfigError(f"shards.{name}={value} must be a positive number of seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthConfig:
    """Who may ask."""

    keys: Path | None = field(default=None, metadata=INPUT_PATH)
    """A file with one bearer token a line, at this path on every node; absent: everybody may.
    Behind a token that may operate the application too: the word `operator`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeConfig:
    """The gRPC server with TLS, keys, health and deadlines in front of the replicas."""

    port: int | None = None
    """Absent: there is no edge. 9443 is usual; 0 takes a free one."""
    only: bool = False
    """Ray Serve's own gRPC port, which has no TLS, is not opened; without a port: 9443."""
    host: str = "127.0.0.1"
    """Where it listens; 0.0.0.0: every interface, which wants a certificate."""
    tls_cert: Path | None = field(default=None, metadata=INPUT_PATH)
    tls_key: Path | None = field(default=None, metadata=INPUT_PATH)
    """A certificate (chain) and its private key in PEM, at these paths on every node."""
    client_ca: Path | None = field(default=None, metadata=INPUT_PATH)
    """Callers must have a certificate of this authority (mTLS)."""
    insecure: bool = False
    """Listen on other hosts than this one without a certificate all the same."""
    reflection: bool = True
    """Let tools ask which methods there are."""
    max_request_bytes: int = 4 * 2**20
    keepalive_s: float = 30.0
    """A connection that is silent for longer is asked whether it lives."""
    stall_s: float = 30.0
    """Health is NOT_SERVING when work is pending and nothing came out for longer."""
    health_every_s: float = 1.0
    """Seconds between two looks at the replicas."""
    tries: int = 3
    """Replicas that a request is given to, one after the other, when they die."""
    resume_s: float = 60.0
    """Another replica must take over within this time."""

    def __post_init__(self) -> None:
        if self.port is not None and not 0 <= self.port <= 65535:
            raise ConfigError(f"edge.port={self.port} is not a port; use 1 to 65535, or 0")
        for name in ("keepalive_s", "stall_s", "health_every_s", "resume_s"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise ConfigError(f"edge.{name}={value} must be a positive number of seconds")
        for name in ("max_request_bytes", "tries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"edge.{name}={getattr(self, name)} must be at least 1")
        self._check_tls()

    @property
    def wanted_port(self) -> int | None:
        """The port, 0 for a free one; None: no edge."""
        return _USUAL_EDGE_PORT if self.only and self.port is None else self.port

    def _check_tls(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("edge.tls_cert and edge.tls_key go together; give both or none")
        if self.client_ca is not None and self.tls_cert is None:
            raise ConfigError("edge.client_ca wants edge.tls_cert and edge.tls_key beside it")
        here = self.host in ("localhost", "::1") or self.host.startswith("127.")
        if self.tls_cert is None and not here and not self.insecure:
            raise ConfigError(
                f"edge.host={self.host} without a certificate would send keys and texts in the "
                "open; give edge.tls_cert and edge.tls_key, listen on edge.host=127.0.0.1, or say "
                "edge.insecure=true"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """One model served as one Ray Serve application."""

    checkpoint: Location = field(metadata=INPUT_PATH)
    """A checkpoint's folder, or a run's: then its latest checkpoint. Also as a URI."""
    cache_dir: Path = Path("~/.cache/gptmoe")
    """Where a node keeps a checkpoint that was a URI; ~: its user's home. Never emptied."""
    name: str = "gptmoe"
    """The application's name, and what GetModel calls the model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute in this type. float32 has training's numbers, bfloat16 decodes faster: see README."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where a replica computes; cuda: each asks Ray for a GPU. Only for whole models."""
    invariant: bool = False
    """On a GPU: a text's bits do not depend on what else is computed, at a cost. CPUs always do so.
    """
    weights: Literal["", "int8", "int4"] = ""
    """Hold the weights of products in 8 or 4 bits; empty: in dtype. Only for whole models."""
    verify: bool = True
    """Compare checksums when weights are read; false: sizes only (see `gptmoe verify`)."""
    host: str = "127.0.0.1"
    """Where HTTP listens; 0.0.0.0: every interface, as Ray Serve's gRPC port always does."""
    http_port: int = 8000
    grpc_port: int = 9000
    """Ports; 0 takes a free one."""
    address: str = ""
    """The Ray cluster to join; empty: a local one is started, and stopped at the end."""
    threads: int = 0
    """Threads of a replica, or of each of its shards; 0: their share of the cores."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    log: LogConfig = field(default_factory=LogConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    edge: EdgeConfig = field(default_factory=EdgeConfig)
    auth: AuthConfig = field(default_factory=AuthConfig)

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("name is empty; name the application, for example name=gptmoe")
        if "#" in self.name:
            raise ConfigError(f"name={self.name!r} may not contain #, which Ray Serve uses itself")
        for key in ("http_port", "grpc_port"):
            if not 0 <= (port := getattr(self, key)) <= 65535:
                raise ConfigError(
                    f"{key}={port} is not a port; use 1 to 65535, or 0 for a free one"
                )
        ports = {"http_port": self.http_port, "edge.port": self.edge.wanted_port}
        if not self.edge.only:
            ports["grpc_port"] = self.grpc_port
        for one, other in itertools.combinations(sorted(ports), 2):
            if ports[one] and ports[one] == ports[other]:
                raise ConfigError(f"{one} and {other} are both {ports[one]}; use two ports")
        if self.weights and self.parallel.world > 1:
            raise ConfigError(
                f'weights="{self.weights}" is for models that a replica holds alone, but '
                f'[parallel] asks for {self.parallel.world} shards; use weights="" or one shard'
            )
        if self.device == "cuda" and self.parallel.world > 1:
            raise ConfigError(
                'device="cuda" is for models that a replica holds alone, but [parallel] asks for '
                f"{self.parallel.world} shards; their caches and exchanges are for CPUs as yet"
            )
        if self.device == "cuda" and self.weights:
            raise ConfigError(
                f'weights="{self.weights}" is for CPUs; use weights="" with device="cuda"'
            )
        if self.threads < 0:
            raise ConfigError(f"threads={self.threads} must be at least 1, or 0 for its share")
