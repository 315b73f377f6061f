"""When a request is given to another replica, and when its caller is told."""

import pytest

from gptmoe.errors import (
    AlreadyRunning,
    ClusterError,
    GptMoeError,
    Overloaded,
    RequestError,
    Unavailable,
)
from serve.edge.patience import OtherText, Patience, ReplicaLost

LOST = ReplicaLost("gone")


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("lost", [LOST, ClusterError("this replica's engine has stopped")])
def test_so_many_replicas_may_be_lost(lost: GptMoeError) -> None:
    patience = Patience(tries=3, resume_s=10.0)
    assert patience.wait_s(lost) == 0.0
    assert patience.wait_s(lost, begun=True) == 0.0
    with pytest.raises(Unavailable, match="no replica could finish the request; send it again"):
        patience.wait_s(lost)


@pytest.mark.parametrize(
    "refusal",
    [
        RequestError("top_p"),
        Overloaded("full"),
        Unavailable("draining"),
        AlreadyRunning("mine"),
    ],
)
def test_what_a_replica_refuses_at_once_is_refused(refusal: GptMoeError) -> None:
    with pytest.raises(type(refusal)) as error:
        Patience(tries=3, resume_s=10.0).wait_s(refusal)
    assert error.value is refusal


def test_a_text_that_has_begun_waits_for_room_until_its_time_is_over() -> None:
    clock = Clock()
    patience = Patience(tries=3, resume_s=10.0, clock=clock)
    assert patience.left_s is None
    patience.wait_s(LOST, begun=True)
    for error, wait_s in (
        (Overloaded("full", 2.0), 2.0),
        (Unavailable("a shard is away", 30.0), 10.0),
        (Unavailable("for a moment", 0.0), 0.5),
    ):
        assert patience.wait_s(error, begun=True) == wait_s
    clock.now_s += 4
    assert patience.left_s == 6.0
    clock.now_s += 7
    assert patience.left_s == 0.0
    with pytest.raises(Unavailable, match="no replica could finish the request"):
        patience.wait_s(Overloaded("full"), begun=True)
    patience.moved()
    assert patience.left_s is None
    assert patience.wait_s(Overloaded("full"), begun=True) == 1.0


def test_what_cannot_go_on_is_given_up_at_the_first_loss() -> None:
    with pytest.raises(Unavailable, match="no replica could finish"):
        Patience(tries=3, resume_s=10.0).wait_s(LOST, begun=True, can_go_on=False)


def test_another_text_ends_it() -> None:
    with pytest.raises(OtherText):
        Patience(tries=3, resume_s=10.0).wait_s(OtherText("weights have changed"), begun=True)
