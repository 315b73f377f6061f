"""The control protocol as frozen dataclasses; protos/control.proto says what each one means.

Fields have the names of the proto fields: `wire.py` maps one to the other by name.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """A group of workers starts; answered with Begun."""

    group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """The epoch that a group of workers belongs to."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRange:
    """Experts [first, end) of one MoE layer."""

    layer: int
    first: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one worker owns: a slice of its stage's layers, and experts of the MoE layers."""

    stage: int = 0
    layers: tuple[int, ...] = ()
    slice: int = 0
    slices: int = 1
    experts: tuple[ExpertRange, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Register:
    """A worker says who it is and what it owns; answered with Accepted."""

    epoch: int
    sequence: int
    worker: str
    rank: int
    node: str
    pid: int
    shard: Shard
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """A worker is alive and has finished `step` steps; answered with Accepted."""

    epoch: int
    sequence: int
    worker: str
    step: int
    counters: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Something failed in an epoch; answered with Accepted."""

    epoch: int
    reason: str
    goes_on: bool = False
    """The workers go on; else all start again."""

    def __str__(self) -> str:
        return self.reason if self.goes_on else f"epoch {self.epoch} ended: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TopologyRequest:
    """Asks for the topology of the live epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A registered worker as the coordinator sees it."""

    worker: str
    rank: int
    node: str
    pid: int
    shard: Shard
    step: int = 0
    heartbeat_age_s: float = 0.0
    counters: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The owners of the live epoch, in rank order, and what failed so far."""

    epoch: int
    run: str
    owners: tuple[Owner, ...] = ()
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The message was taken, or had been taken before."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The message was not taken and nothing changed."""

    epoch: int
    reason: str


Message = (
    Begin | Begun | Register | Heartbeat | Failure | TopologyRequest | Topology | Accepted | Refusal
)
"""What an envelope can carry."""
