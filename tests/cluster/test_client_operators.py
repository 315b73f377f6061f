"""What operators ask by the client, against a server of its own process."""

import grpc
import pytest

from cluster.client import Client, GenerationError
from cluster.remote import watch
from protos import control_pb2

from .conftest import SERVED, ControlServer


def test_an_operator_is_answered(served_at: str, control: ControlServer) -> None:
    with Client(served_at, timeout_s=10) as client:
        assert client.topology() == SERVED
        client.drain()
        client.drain(resume=True, within_s=2.5)
        assert client.refresh("/runs/b", restart=True) == 5
        client.scale(3, within_s=9)
    assert control.requests == [
        control_pb2.ControlQuery(),
        control_pb2.DrainRequest(),
        control_pb2.DrainRequest(resume=True, within_s=2.5),
        control_pb2.RefreshRequest(checkpoint="/runs/b", restart=True),
        control_pb2.ScaleRequest(replicas=3, within_s=9),
    ]


def test_an_operator_is_refused_with_code_and_sentence(
    served_at: str, control: ControlServer
) -> None:
    control.refusal = (grpc.StatusCode.FAILED_PRECONDITION, "it scales itself")
    with Client(served_at, timeout_s=10) as client:
        with pytest.raises(GenerationError, match="FAILED_PRECONDITION: it scales itself"):
            client.scale(2)
        with pytest.raises(GenerationError, match="FAILED_PRECONDITION"):
            next(client.watch_topology())
        with pytest.raises(GenerationError, match="INVALID_ARGUMENT"):
            client.scale(-1)  # never sent


def test_leaving_a_watch_ends_it_on_the_server(served_at: str, control: ControlServer) -> None:
    with Client(served_at, timeout_s=10) as client:
        watch = client.watch_topology(every_s=0.5)
        assert [next(watch) for _ in range(3)] == [SERVED] * 3
        watch.close()
        assert control.left.wait(5)
    assert control.requests == [control_pb2.ControlQuery(every_s=0.5)]


def test_a_watch_asks_another_replica_when_its_own_ends(
    served_at: str, control: ControlServer
) -> None:
    control.breaks_after = 2
    with Client(served_at, timeout_s=10) as client:
        answers = watch(client, 0.5)
        assert [next(answers) for _ in range(4)] == [SERVED] * 4
        assert len(control.requests) == 2
        control.refusal = (grpc.StatusCode.UNAVAILABLE, "all are gone")
        control.breaks_after = 1
        with pytest.raises(GenerationError, match="all are gone"):
            list(watch(client, 0.5))
