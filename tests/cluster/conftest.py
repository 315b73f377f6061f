"""The gptmoe command, called in this process, and an application for operators to ask."""

import threading
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from cluster import env, fields
from cluster.cli import main as cli
from cluster.messages import ExpertRange, Failure, Owner, Shard, Topology
from cluster.operations import Topologies
from protos import control_pb2, control_pb2_grpc

OWNERS = tuple(
    Owner(  # of two experts, the first of which has three quarters of the rows
        worker=f"shard-{rank}",
        rank=rank,
        node="node-a",
        pid=70 + rank,
        shard=Shard(
            layers=(0, 1),
            data=rank,
            experts=(ExpertRange(layer=1, first=2 * rank, end=2 * rank + 2),),
        ),
        step=20,
        counters={
            "weights_bytes": 1e6,
            f"rows/1/{2 * rank}": 900.0,
            f"rows/1/{2 * rank + 1}": 300.0,
        },
    )
    for rank, first in ((0, 0), (1, 2))
)
SERVED = Topologies(
    application="poems",
    topologies=(
        Topology(
            epoch=3,
            run="poems#1",
            owners=OWNERS,
            failures=(Failure(epoch=2, reason="rank 1 died; started again: rank 1", goes_on=True),),
        ),
    ),
    replicas=1,
    checkpoint="/runs/a/checkpoints/step-00000001",
    version=4,
)


class ControlServer(control_pb2_grpc.ClusterControlServicer):
    """An application on shards. `refusal` is what it answers instead, if given."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self.left = threading.Event()
        self.breaks_after: int | None = None

    def GetTopology(self, request: Any, context: Any) -> Any:
        return self._answer(request, context, _served())

    def WatchTopology(self, request: Any, context: Any) -> Iterator[Any]:
        context.add_callback(self.left.set)
        first = self._answer(request, context, _served())
        sent = 0
        while context.is_active():
            yield first
            sent += 1
            if sent == self.breaks_after:
                self.breaks_after = None
                context.abort(grpc.StatusCode.UNAVAILABLE, "the replica is being stopped")
            time.sleep(0.02)

    def Drain(self, request: Any, context: Any) -> Any:
        return self._answer(request, context, control_pb2.DrainResponse())

    def Refresh(self, request: Any, context: Any) -> Any:
        answer = control_pb2.RefreshResponse(version=5, checkpoint=request.checkpoint)
        return self._answer(request, context, answer)

    def Scale(self, request: Any, context: Any) -> Any:
        return self._answer(request, context, control_pb2.ScaleResponse(replicas=request.replicas))

    def _answer(self, request: Any, context: Any, answer: Any) -> Any:
        self.requests.append(request)
        if self.refusal:
            context.abort(*self.refusal)
        return answer


def _served() -> Any:
    message = control_pb2.Topologies()
    fields.fill(message, SERVED)
    return message


@pytest.fixture
def control() -> ControlServer:
    return ControlServer()


@pytest.fixture
def served_at(control: ControlServer) -> Iterator[str]:
    """Where `control` answers."""
    running = grpc.server(futures.ThreadPoolExecutor(4))
    control_pb2_grpc.add_ClusterControlServicer_to_server(control, running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    yield f"127.0.0.1:{port}"
    running.stop(None).wait(5)


class Run:
    """Calls the command in this process: Python starts and imports torch once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self._monkeypatch.setattr("sys.argv", ["gptmoe", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = self._capsys.readouterr()
        return int(ended.value.code or 0), out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """From the checkout's folder, as the documentation has it."""
    monkeypatch.chdir(env.ROOT)
    return Run(monkeypatch, capsys)
