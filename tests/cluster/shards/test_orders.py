"""Commands to all shards at once, and what their answers mean."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from cluster import wire
from cluster.messages import Accepted, Command, Failure, Load, Message, Ready, Refusal
from cluster.shards.orders import LOOK_EVERY_S, Answers, order, sort_answers
from gptmoe.errors import ClusterError

READY = Ready(epoch=1, sequence=2)


@dataclass
class Mail:
    """A post whose shards have their answers in hand; None is lost."""

    answers: dict[int, Message | None]
    sent: dict[int, Message] = field(default_factory=dict)
    looks: int = 1
    """The last answer is there at this look."""

    def send(self, rank: int, data: bytes) -> str:
        self.sent[rank] = wire.decode(data)
        return f"call to {rank}"

    def wait(self, calls: Mapping[int, str], within_s: float) -> bool:
        assert 0 < within_s <= LOOK_EVERY_S
        self.looks -= 1
        return not self.looks

    def collect(self, calls: Mapping[int, str]) -> dict[int, bytes | None]:
        assert calls == {rank: f"call to {rank}" for rank in self.sent}
        return {
            rank: None if message is None else wire.encode(message)
            for rank, message in self.answers.items()
        }


def load(rank: int) -> Command:
    return Load(epoch=1, sequence=rank + 1)


def test_each_rank_gets_its_command_and_all_are_ready() -> None:
    mail = Mail({2: READY, 0: READY})
    answers = order(mail, [0, 2], load, 3.5)
    assert answers == Answers({0: READY, 2: READY}, (), {})
    answers.check("loading")
    assert mail.sent == {0: load(0), 2: load(2)}
    assert mail.looks == 0


def test_nobody_waits_longer_than_told_nor_without_hope() -> None:
    mail = Mail({0: None, 1: READY}, looks=1000)
    assert order(mail, [0, 1], load, 0.0).lost == (0,)
    hope = iter([False, False, True])
    assert order(mail, [0, 1], load, 3600.0, lambda: next(hope)).lost == (0,)
    assert mail.looks == 997


def test_answers_are_sorted_by_what_they_mean() -> None:
    answers = {
        5: None,
        4: wire.encode(Accepted(epoch=1)),
        3: wire.encode(Failure(epoch=1, reason="no space left")),
        2: wire.encode(Refusal(epoch=1, reason="Join comes after Load")),
        1: None,
        0: wire.encode(READY),
    }
    assert sort_answers(answers) == Answers(
        ready={0: READY},
        lost=(1, 5),
        refusals={2: "Join comes after Load", 3: "no space left", 4: "it answers Accepted"},
    )


def test_the_first_refusal_is_named_before_those_who_do_not_answer() -> None:
    answers = order(
        Mail({0: None, 2: Refusal(epoch=1, reason="late"), 1: Failure(epoch=1, reason="full")}),
        [0, 1, 2],
        load,
        1.0,
    )
    with pytest.raises(ClusterError, match=r"^loading: rank 1 says: full$"):
        answers.check("loading")


def test_all_who_do_not_answer_are_named() -> None:
    answers = order(Mail({0: None, 1: READY, 2: None}), [0, 1, 2], load, 1.0)
    assert answers.ready == {1: READY}
    with pytest.raises(ClusterError, match=r"^meeting: rank 0, 2 does not answer$"):
        answers.check("meeting")
