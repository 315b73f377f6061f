"""What an operator may ask of a served application, and what comes back.

Messages of the service ClusterControl in protos/control.proto, which says what each one means.
"""

from dataclasses import dataclass

from .messages import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlQuery:
    """Asks for Topologies, once or every so often."""

    every_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Topologies:
    """One application: the topologies of its replicas, and what they serve."""

    application: str
    topologies: tuple[Topology, ...] = ()
    replicas: int = 0
    checkpoint: str = ""
    version: int = 0
    draining: bool = False
    threads: int = 0
    """That each replica, or each of its shards, computes with; 0: not known."""
    nodes: tuple[str, ...] = ()
    """Of each replica that runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainRequest:
    """Take no new requests, or take them again."""

    resume: bool = False
    within_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainResponse:
    """All replicas do so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshRequest:
    """Serve other weights of the same config."""

    checkpoint: str
    restart: bool = False
    within_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshResponse:
    """All replicas have them."""

    version: int
    checkpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRequest:
    """Set the number of replicas."""

    replicas: int
    within_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleResponse:
    """So many replicas run."""

    replicas: int


Asked = ControlQuery | DrainRequest | RefreshRequest | ScaleRequest
"""What an operator can ask of an application."""

Answered = Topologies | DrainResponse | RefreshResponse | ScaleResponse
"""What an operator is answered."""
