"""The operators' gRPC methods, without Ray: bytes in, messages and statuses out."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest

from cluster.messages import Topology
from cluster.operations import ControlQuery, DrainRequest, RefreshRequest, ScaleRequest
from gptmoe.errors import ClusterError, GptMoeError, RequestError
from protos import control_pb2 as messages
from serve.control import ControlServicer
from serve.controller import Settings, State
from serve.operations import Operations
from serve.refusals import NotWithThis

STATE = State(
    settings=Settings(checkpoint="/a", version=3),
    status="RUNNING",
    message="",
    states={"me": "RUNNING", "other": "RUNNING"},
    wanted=2,
    scales_itself=False,
    nodes={"me": "10.0.0.1", "other": "10.0.0.2"},
)
Code = grpc.StatusCode


class Application:
    """What the controller would do: `later` are the states that come one by one after a call."""

    name = "poems"

    def __init__(self) -> None:
        self.now = STATE
        self.later: list[State] = []
        self.changes: list[Settings] = []
        self.scales: list[int] = []

    def state(self) -> State:
        if self.later:
            self.now = self.later.pop(0)
        return self.now

    def change(self, settings: Settings) -> None:
        self.changes.append(settings)
        done = replace(self.now, settings=settings)
        if not self.later:
            waiting = replace(self.now, status="DEPLOYING")
            self.later = [waiting, replace(done, status="DEPLOYING"), done]

    def scale(self, replicas: int) -> None:
        self.scales.append(replicas)
        if replicas > 8:
            raise NotWithThis("application poems scales itself")
        if not self.later:
            states = {str(number): "RUNNING" for number in range(replicas)}
            leaving = {"old": "STOPPING"}
            wanted = replace(self.now, wanted=replicas)
            self.later = [wanted, replace(wanted, states=states | leaving)]


class Context:
    def __init__(self) -> None:
        self.code: Any = None
        self.details = ""

    def set_code(self, code: Any) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self.trailing = trailing_metadata


def check(wanted: str) -> str:
    if wanted == "/other":
        raise NotWithThis("/other holds a model of another config")
    if wanted != "/b":
        raise RequestError(f"{wanted} is no checkpoint")
    return "/b/step-1"


@pytest.fixture
def application() -> Application:
    return Application()


@pytest.fixture
def call(application: Application) -> Callable[..., tuple[Any, Context]]:
    """Call a method with the fields of its request, or with bytes."""
    topology = Topology(epoch=1, run="poems#1")
    servicer = ControlServicer()
    servicer.operations = Operations(
        application,
        me="me",
        check=check,
        topologies=lambda prefix: (topology,) if prefix == "poems#" else (),
        threads=2,
    )

    def call(method: str, kind: Any = None, data: bytes = b"", **fields: Any) -> Any:
        context = Context()
        data = kind(**fields).SerializeToString() if kind else data
        return asyncio.run(getattr(servicer, method)(data, context)), context

    call.servicer = servicer  # type: ignore[attr-defined]
    return call


def test_the_topology_says_what_is_served(call: Any) -> None:
    answer, context = call("GetTopology")
    assert context.code is None
    assert answer == messages.Topologies(
        application="poems",
        topologies=[messages.Topology(epoch=1, run="poems#1")],
        replicas=2,
        checkpoint="/a",
        version=3,
        threads=2,
        nodes=["10.0.0.1", "10.0.0.2"],
    )


def test_a_watch_ends_with_its_replica(call: Any, application: Application) -> None:
    application.later = [STATE, STATE, replace(STATE, states={"me": "STOPPING"})]
    context, seen = Context(), []

    async def watch() -> None:
        data = messages.ControlQuery(every_s=0.2).SerializeToString()
        async for answer in call.servicer.WatchTopology(data, context):
            seen.append(answer)

    with pytest.raises(ClusterError, match="is being stopped; ask again"):
        asyncio.run(watch())
    assert (len(seen), context.code) == (2, Code.UNAVAILABLE)


def test_a_watch_that_is_too_fast_is_refused(call: Any) -> None:
    context = Context()

    async def watch() -> None:
        data = messages.ControlQuery(every_s=0.01).SerializeToString()
        async for _ in call.servicer.WatchTopology(data, context):
            pass

    with pytest.raises(GptMoeError):
        asyncio.run(watch())
    assert (context.code, context.details) == (
        Code.INVALID_ARGUMENT,
        "every_s must be at least 0.2, or 0 for 1; found 0.01",
    )


def test_few_may_watch_at_a_time(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds a place that health checks and requests need, too."""
    monkeypatch.setattr("serve.control.MOST_WATCHERS", 2)
    data = messages.ControlQuery(every_s=60).SerializeToString()
    context = Context()

    async def watch() -> None:
        watching = [call.servicer.WatchTopology(data, Context()) for _ in range(2)]
        for one in watching:
            await anext(one)
        with pytest.raises(GptMoeError):
            await anext(call.servicer.WatchTopology(data, context))
        await watching.pop().aclose()
        await anext(call.servicer.WatchTopology(data, Context()))

    asyncio.run(watch())
    assert context.code == Code.RESOURCE_EXHAUSTED
    assert "2 callers watch this replica already" in context.details


def test_drain_and_resume_change_nothing_else(call: Any, application: Application) -> None:
    assert call("Drain")[0] == messages.DrainResponse()
    call("Drain", messages.DrainRequest, resume=True)
    assert application.changes == [
        replace(STATE.settings, draining=True),
        replace(STATE.settings, draining=False),
    ]


def test_refresh_is_the_next_version(call: Any, application: Application) -> None:
    answer, _ = call("Refresh", messages.RefreshRequest, checkpoint="/b", restart=True)
    assert answer == messages.RefreshResponse(version=4, checkpoint="/b/step-1")
    assert application.changes == [Settings(checkpoint="/b/step-1", version=4, restart=True)]


def test_scale_waits_for_running_replicas_only(call: Any, application: Application) -> None:
    answer, _ = call("Scale", messages.ScaleRequest, replicas=3)
    assert (answer.replicas, application.scales) == (3, [3])


@pytest.mark.parametrize(
    ("method", "fields", "code", "sentence"),
    [
        ("Refresh", {}, Code.INVALID_ARGUMENT, "is no checkpoint"),
        ("Refresh", {"checkpoint": "/other"}, Code.FAILED_PRECONDITION, "another config"),
        ("Refresh", {"checkpoint": "/b", "within_s": -1}, Code.INVALID_ARGUMENT, "within_s must"),
        ("Scale", {}, Code.INVALID_ARGUMENT, "replicas must be at least 1 and at most 10000"),
        ("Scale", {"replicas": 2**31 - 1}, Code.INVALID_ARGUMENT, "found 2147483647"),
        ("Scale", {"replicas": 9}, Code.FAILED_PRECONDITION, "scales itself"),
        ("Drain", {"within_s": float("nan")}, Code.INVALID_ARGUMENT, "found nan"),
    ],
)
def test_a_refusal_changes_nothing(
    call: Any, application: Application, method: str, fields: Any, code: Any, sentence: str
) -> None:
    answer, context = call(method, getattr(messages, f"{method}Request"), **fields)
    assert answer == getattr(messages, f"{method}Response")()
    assert context.code == code
    assert sentence in context.details
    assert not application.changes


@pytest.mark.parametrize("method", ["GetTopology", "Drain", "Refresh", "Scale"])
def test_unreadable_bytes_are_an_invalid_argument(call: Any, method: str) -> None:
    _, context = call(method, data=b"\xff\xff\xff\xff")
    assert context.code == Code.INVALID_ARGUMENT
    assert "the request is not a gptmoe.v1." in context.details


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (lambda them: them.topology(ControlQuery(every_s=float("nan"))), "every_s"),
        (lambda them: them.topology(ControlQuery(every_s=-1)), "every_s"),
        (lambda them: them.drain(DrainRequest(within_s=float("inf"))), "within_s"),
        (lambda them: them.refresh(RefreshRequest(checkpoint="/b", within_s=-1)), "within_s"),
        (lambda them: them.scale(ScaleRequest(replicas=1, within_s=-1)), "within_s"),
        (lambda them: them.scale(ScaleRequest(replicas=0)), "replicas"),
        (lambda them: them.scale(ScaleRequest(replicas=2**31 - 1)), "replicas"),
    ],
)
def test_a_refusal_names_its_field(call: Any, ask: Any, field: str) -> None:
    with pytest.raises(RequestError, match=f"^{field} must be") as error:
        asyncio.run(ask(call.servicer.operations))
    assert error.value.field == field


def busy(**changed: Any) -> State:
    return replace(STATE, status="DEPLOYING", **changed)


@pytest.mark.parametrize(
    ("later", "code", "sentence"),
    [
        ([STATE, *[busy()] * 9], Code.DEADLINE_EXCEEDED, "not all replicas have changed in time"),
        ([STATE, STATE], Code.ABORTED, "another operator"),
        (
            [STATE, replace(STATE, status="DEPLOY_FAILED", message="Traceback\n no memory\n")],
            Code.UNAVAILABLE,
            "not all replicas could change: no memory",
        ),
    ],
)
def test_replicas_that_do_not_follow(
    call: Any, application: Application, later: list[State], code: Any, sentence: str
) -> None:
    application.later = later
    _, context = call("Drain", messages.DrainRequest, within_s=0.3)
    assert (context.code, sentence in context.details) == (code, True), context.details


def test_replicas_that_do_not_come(call: Any, application: Application) -> None:
    application.later = [replace(STATE, wanted=5, message="no room")] * 9
    _, context = call("Scale", messages.ScaleRequest, replicas=5, within_s=0.3)
    assert context.code == Code.DEADLINE_EXCEEDED
    assert "2 of 5 replicas run so far" in context.details
    assert "(no room)" in context.details
    application.later = [replace(STATE, wanted=4)]
    _, context = call("Scale", messages.ScaleRequest, replicas=5)
    assert (context.code, "wants 4 replicas, not 5" in context.details) == (Code.ABORTED, True)
