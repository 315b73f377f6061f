from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Begin(_message.Message):
    __slots__ = ("group",)
    GROUP_FIELD_NUMBER: _ClassVar[int]
    group: str
    def __init__(self, group: _Optional[str] = ...) -> None: ...

class Begun(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class ExpertRange(_message.Message):
    __slots__ = ("layer", "first", "end")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    layer: int
    first: int
    end: int
    def __init__(self, layer: _Optional[int] = ..., first: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("stage", "layers", "slice", "slices", "experts", "data", "experts_only")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_ONLY_FIELD_NUMBER: _ClassVar[int]
    stage: int
    layers: _containers.RepeatedScalarFieldContainer[int]
    slice: int
    slices: int
    experts: _containers.RepeatedCompositeFieldContainer[ExpertRange]
    data: int
    experts_only: bool
    def __init__(self, stage: _Optional[int] = ..., layers: _Optional[_Iterable[int]] = ..., slice: _Optional[int] = ..., slices: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[ExpertRange, _Mapping]]] = ..., data: _Optional[int] = ..., experts_only: _Optional[bool] = ...) -> None: ...

class Register(_message.Message):
    __slots__ = ("epoch", "sequence", "worker", "rank", "node", "pid", "shard", "digest")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence: int
    worker: str
    rank: int
    node: str
    pid: int
    shard: Shard
    digest: str
    def __init__(self, epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., worker: _Optional[str] = ..., rank: _Optional[int] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., shard: _Optional[_Union[Shard, _Mapping]] = ..., digest: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("epoch", "sequence", "worker", "step", "counters")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence: int
    worker: str
    step: int
    counters: _containers.ScalarMap[str, float]
    def __init__(self, epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., worker: _Optional[str] = ..., step: _Optional[int] = ..., counters: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("epoch", "sequence", "rank", "shards", "checkpoint", "version", "config_digest", "dtype", "slots", "threads", "group")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CONFIG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence: int
    rank: int
    shards: _containers.RepeatedCompositeFieldContainer[Shard]
    checkpoint: str
    version: int
    config_digest: str
    dtype: str
    slots: int
    threads: int
    group: str
    def __init__(self, epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., rank: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ..., checkpoint: _Optional[str] = ..., version: _Optional[int] = ..., config_digest: _Optional[str] = ..., dtype: _Optional[str] = ..., slots: _Optional[int] = ..., threads: _Optional[int] = ..., group: _Optional[str] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("epoch", "sequence")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence: int
    def __init__(self, epoch: _Optional[int] = ..., sequence: _Optional[int] = ...) -> None: ...

class Join(_message.Message):
    __slots__ = ("epoch", "sequence", "host", "port", "timeout_s")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence: int
    host: str
    port: int
    timeout_s: float
    def __init__(self, epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., host: _Optional[str] = ..., port: _Optional[int] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class Refresh(_message.Message):
    __slots__ = ("epoch", "sequence", "checkpoint", "version")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence: int
    checkpoint: str
    version: int
    def __init__(self, epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., checkpoint: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class Keep(_message.Message):
    __slots__ = ("epoch", "sequence", "versions")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence: int
    versions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., versions: _Optional[_Iterable[int]] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("epoch", "sequence")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence: int
    def __init__(self, epoch: _Optional[int] = ..., sequence: _Optional[int] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("epoch", "sequence", "weights_bytes", "seconds")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence: int
    weights_bytes: int
    seconds: float
    def __init__(self, epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., weights_bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("slot", "start", "count", "outputs")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    start: int
    count: int
    outputs: int
    def __init__(self, slot: _Optional[int] = ..., start: _Optional[int] = ..., count: _Optional[int] = ..., outputs: _Optional[int] = ...) -> None: ...

class Copy(_message.Message):
    __slots__ = ("source", "target", "count")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    source: int
    target: int
    count: int
    def __init__(self, source: _Optional[int] = ..., target: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("epoch", "sequence", "version", "spans", "num_decoding", "token_ids", "most_rows", "fixed", "compute_s", "exchange_s", "copies")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODING_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MOST_ROWS_FIELD_NUMBER: _ClassVar[int]
    FIXED_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_S_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence: int
    version: int
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    num_decoding: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    most_rows: int
    fixed: bool
    compute_s: float
    exchange_s: float
    copies: _containers.RepeatedCompositeFieldContainer[Copy]
    def __init__(self, epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., version: _Optional[int] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., num_decoding: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., most_rows: _Optional[int] = ..., fixed: _Optional[bool] = ..., compute_s: _Optional[float] = ..., exchange_s: _Optional[float] = ..., copies: _Optional[_Iterable[_Union[Copy, _Mapping]]] = ...) -> None: ...

class StepDone(_message.Message):
    __slots__ = ("epoch", "sequence", "rows", "compute_s", "exchange_s")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_S_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence: int
    rows: int
    compute_s: float
    exchange_s: float
    def __init__(self, epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., rows: _Optional[int] = ..., compute_s: _Optional[float] = ..., exchange_s: _Optional[float] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("epoch", "reason", "goes_on")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    GOES_ON_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    reason: str
    goes_on: bool
    def __init__(self, epoch: _Optional[int] = ..., reason: _Optional[str] = ..., goes_on: _Optional[bool] = ...) -> None: ...

class TopologyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Owner(_message.Message):
    __slots__ = ("worker", "rank", "node", "pid", "shard", "step", "heartbeat_age_s", "counters")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    WORKER_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_AGE_S_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    rank: int
    node: str
    pid: int
    shard: Shard
    step: int
    heartbeat_age_s: float
    counters: _containers.ScalarMap[str, float]
    def __init__(self, worker: _Optional[str] = ..., rank: _Optional[int] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., shard: _Optional[_Union[Shard, _Mapping]] = ..., step: _Optional[int] = ..., heartbeat_age_s: _Optional[float] = ..., counters: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Topology(_message.Message):
    __slots__ = ("epoch", "run", "owners", "failures")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    OWNERS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    run: str
    owners: _containers.RepeatedCompositeFieldContainer[Owner]
    failures: _containers.RepeatedCompositeFieldContainer[Failure]
    def __init__(self, epoch: _Optional[int] = ..., run: _Optional[str] = ..., owners: _Optional[_Iterable[_Union[Owner, _Mapping]]] = ..., failures: _Optional[_Iterable[_Union[Failure, _Mapping]]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("epoch", "reason")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    reason: str
    def __init__(self, epoch: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("version", "begin", "begun", "register", "heartbeat", "topology_request", "topology", "accepted", "refusal", "failure", "plan", "load", "join", "refresh", "drain", "ready", "step", "step_done", "keep")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_REQUEST_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    JOIN_FIELD_NUMBER: _ClassVar[int]
    REFRESH_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEP_DONE_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    version: int
    begin: Begin
    begun: Begun
    register: Register
    heartbeat: Heartbeat
    topology_request: TopologyRequest
    topology: Topology
    accepted: Accepted
    refusal: Refusal
    failure: Failure
    plan: Plan
    load: Load
    join: Join
    refresh: Refresh
    drain: Drain
    ready: Ready
    step: Step
    step_done: StepDone
    keep: Keep
    def __init__(self, version: _Optional[int] = ..., begin: _Optional[_Union[Begin, _Mapping]] = ..., begun: _Optional[_Union[Begun, _Mapping]] = ..., register: _Optional[_Union[Register, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., topology_request: _Optional[_Union[TopologyRequest, _Mapping]] = ..., topology: _Optional[_Union[Topology, _Mapping]] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., join: _Optional[_Union[Join, _Mapping]] = ..., refresh: _Optional[_Union[Refresh, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., step_done: _Optional[_Union[StepDone, _Mapping]] = ..., keep: _Optional[_Union[Keep, _Mapping]] = ...) -> None: ...

class ControlQuery(_message.Message):
    __slots__ = ("every_s",)
    EVERY_S_FIELD_NUMBER: _ClassVar[int]
    every_s: float
    def __init__(self, every_s: _Optional[float] = ...) -> None: ...

class Topologies(_message.Message):
    __slots__ = ("application", "topologies", "replicas", "checkpoint", "version", "draining", "threads", "nodes")
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGIES_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    application: str
    topologies: _containers.RepeatedCompositeFieldContainer[Topology]
    replicas: int
    checkpoint: str
    version: int
    draining: bool
    threads: int
    nodes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, application: _Optional[str] = ..., topologies: _Optional[_Iterable[_Union[Topology, _Mapping]]] = ..., replicas: _Optional[int] = ..., checkpoint: _Optional[str] = ..., version: _Optional[int] = ..., draining: _Optional[bool] = ..., threads: _Optional[int] = ..., nodes: _Optional[_Iterable[str]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("resume", "within_s")
    RESUME_FIELD_NUMBER: _ClassVar[int]
    WITHIN_S_FIELD_NUMBER: _ClassVar[int]
    resume: bool
    within_s: float
    def __init__(self, resume: _Optional[bool] = ..., within_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RefreshRequest(_message.Message):
    __slots__ = ("checkpoint", "restart", "within_s")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    RESTART_FIELD_NUMBER: _ClassVar[int]
    WITHIN_S_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    restart: bool
    within_s: float
    def __init__(self, checkpoint: _Optional[str] = ..., restart: _Optional[bool] = ..., within_s: _Optional[float] = ...) -> None: ...

class RefreshResponse(_message.Message):
    __slots__ = ("version", "checkpoint")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    version: int
    checkpoint: str
    def __init__(self, version: _Optional[int] = ..., checkpoint: _Optional[str] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("replicas", "within_s")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    WITHIN_S_FIELD_NUMBER: _ClassVar[int]
    replicas: int
    within_s: float
    def __init__(self, replicas: _Optional[int] = ..., within_s: _Optional[float] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: int
    def __init__(self, replicas: _Optional[int] = ...) -> None: ...
