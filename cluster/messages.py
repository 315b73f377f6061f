"""The control protocol as frozen dataclasses; protos/control.proto says what each one means.

Fields have the names of the proto fields: `wire.py` maps one to the other by name.
"""

from dataclasses import dataclass, field

SILENT_S = 15.0
"""A worker of a running run that was not heard of for longer is marked."""


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
    data: int = 0
    experts_only: bool = False


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

    @property
    def is_silent(self) -> bool:
        """Whether it has not been heard of for so long that people are to notice."""
        return self.heartbeat_age_s > SILENT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The owners of the live epoch, in rank order, and what failed so far."""

    epoch: int
    run: str
    owners: tuple[Owner, ...] = ()
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """To a shard, first in an epoch: who is who; older groups are left at once."""

    epoch: int
    sequence: int
    rank: int
    shards: tuple[Shard, ...]
    checkpoint: str
    version: int
    config_digest: str
    dtype: str
    slots: int
    threads: int
    group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """To a shard: read the weights of the plan; answered with Ready."""

    epoch: int
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """To a shard: meet the others and make the groups; answered with Ready."""

    epoch: int
    sequence: int
    host: str
    port: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Refresh:
    """To a shard: read new weights beside the old ones; answered with Ready."""

    epoch: int
    sequence: int
    checkpoint: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """To a shard: let go of all weights but these versions; answered with Ready."""

    epoch: int
    sequence: int
    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """To a shard: leave the groups, take no more steps; answered with Ready."""

    epoch: int
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """From a shard: command `sequence` was carried out."""

    epoch: int
    sequence: int
    weights_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Tokens start .. start + count - 1 of the sequence in a slot enter a step."""

    slot: int
    start: int
    count: int
    outputs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """The first `count` tokens' keys and values of one slot go into another."""

    source: int
    target: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step runs on one data rank; the header of the activations."""

    epoch: int
    sequence: int
    version: int
    spans: tuple[Span, ...] = ()
    num_decoding: int = 0
    token_ids: tuple[int, ...] = ()
    most_rows: int = 0
    fixed: bool = False
    compute_s: float = 0.0
    exchange_s: float = 0.0
    copies: tuple[Copy, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """From the last stage to the engine; scores follow."""

    epoch: int
    sequence: int
    rows: int = 0
    compute_s: float = 0.0
    exchange_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The message was taken, or had been taken before."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The message was not taken and nothing changed."""

    epoch: int
    reason: str


Command = Plan | Load | Join | Refresh | Keep | Drain
"""What a supervisor tells a shard, in order, each once."""

Message = (
    Begin
    | Begun
    | Register
    | Heartbeat
    | Failure
    | TopologyRequest
    | Topology
    | Accepted
    | Refusal
    | Command
    | Ready
    | Step
    | StepDone
)
"""What an envelope can carry."""
