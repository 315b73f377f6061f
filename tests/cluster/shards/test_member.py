"""A shard's protocol: whatever the network does to commands, the shard ends in the same state."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import wire
from cluster.messages import (
    Command,
    Drain,
    ExpertRange,
    Failure,
    Join,
    Keep,
    Load,
    Message,
    Plan,
    Ready,
    Refresh,
    Refusal,
    Shard,
    Step,
)
from cluster.shards.member import COMMANDS, State, commit, decide, replay, same_weights, take
from gptmoe.errors import ClusterError

EXPERTS = ExpertRange(layer=1, first=0, end=2), ExpertRange(layer=1, first=2, end=4)
SHARDS = tuple(
    Shard(layers=(0, 1), experts=(mine,), data=data) for data, mine in enumerate(EXPERTS)
)


def plan(epoch: int = 1, sequence: int = 1, version: int = 5, dtype: str = "float32") -> Plan:
    return Plan(
        epoch=epoch,
        sequence=sequence,
        rank=1,
        shards=SHARDS,
        checkpoint="runs/tiny",
        version=version,
        config_digest="abc",
        dtype=dtype,
        slots=4,
        threads=1,
        group=f"group-{epoch}",
    )


def load(sequence: int = 2, epoch: int = 1) -> Load:
    return Load(epoch=epoch, sequence=sequence)


def join(sequence: int = 3, epoch: int = 1) -> Join:
    return Join(epoch=epoch, sequence=sequence, host="here", port=7, timeout_s=1.0)


def refresh(version: int, sequence: int = 4, epoch: int = 1) -> Refresh:
    return Refresh(epoch=epoch, sequence=sequence, checkpoint="new", version=version)


def keep(*versions: int, sequence: int = 5, epoch: int = 1) -> Keep:
    return Keep(epoch=epoch, sequence=sequence, versions=versions)


def drain(sequence: int = 4, epoch: int = 1) -> Drain:
    return Drain(epoch=epoch, sequence=sequence)


def step(sequence: int, version: int = 5, epoch: int = 1, most_rows: int = 4) -> Step:
    return Step(epoch=epoch, sequence=sequence, version=version, most_rows=most_rows)


def ready(command: Command) -> Ready:
    return Ready(epoch=command.epoch, sequence=command.sequence)


JOINED = (plan(), load(), join())


@dataclass
class Member:
    """A shard as its actor keeps it: bytes in, bytes out; it carries commands out in no time."""

    state: State = field(default_factory=State)
    carried_out: list[Command | Step] = field(default_factory=list)

    def hear(self, data: bytes, *, fails: bool = False) -> bytes:
        message = wire.decode(data)
        if isinstance(message, Step):
            return wire.encode(self._run(message))
        assert isinstance(message, COMMANDS)
        return wire.encode(self._obey(message, fails))

    def _obey(self, command: Command, fails: bool) -> Message:
        verdict = decide(self.state, command)
        if verdict.answer is not None:
            return verdict.answer
        if fails:
            return Failure(epoch=command.epoch, reason="no space left")
        self.state = commit(self.state, command, ready(command))
        self.carried_out.append(command)
        return ready(command)

    def _run(self, step: Step) -> Message:
        try:
            self.state, run = take(self.state, step)
        except ClusterError as error:
            return Refusal(epoch=self.state.epoch, reason=str(error))
        if run:
            self.carried_out.append(step)
        return Ready(epoch=step.epoch, sequence=step.sequence)


def test_the_commands_of_an_epoch_bring_a_shard_from_plan_to_drain() -> None:
    state = State()
    seen = []
    for message in (*JOINED, step(1), refresh(6), step(2, version=6), step(3), drain(5)):
        state = replay([message], state)
        seen.append((state.loaded, state.joined, state.drained, state.versions, state.steps))
    assert seen == [
        (False, False, False, (), 0),
        (True, False, False, (5,), 0),
        (True, True, False, (5,), 0),
        (True, True, False, (5,), 1),
        (True, True, False, (5, 6), 1),
        (True, True, False, (5, 6), 2),
        (True, True, False, (5, 6), 3),
        (True, True, True, (5, 6), 3),
    ]
    assert (state.epoch, state.plan) == (1, plan())
    assert [command for command, _ in state.done] == [*JOINED, refresh(6), drain(5)]


@pytest.mark.parametrize(
    ("before", "command", "reason"),
    [
        ([plan(2)], plan(1), "epoch 1 is over, epoch 2 is live"),
        ([plan(2)], load(), "epoch 1 is over, epoch 2 is live"),
        ([], load(), "epoch 1 has no plan here; send Plan first"),
        ([plan()], drain(epoch=2), "epoch 2 has no plan here; send Plan first"),
        ([plan()], plan(2, sequence=2), "epoch 2 has no plan here; send Plan first"),
        ([], load(1, epoch=0), "epoch 0 has no plan; a new epoch begins with Plan"),
        ([], plan(0), "epoch 0 has no plan; a new epoch begins with Plan"),
        ([plan()], plan(version=6), "command 1 was another one: Plan"),
        ([plan(), load()], join(2), "command 2 was another one: Load"),
        ([plan()], load(3), "command 3 came before command 2, which is missing"),
        ([plan()], load(0), "command 0 came before command 2, which is missing"),
        ([plan()], plan(sequence=2), "epoch 1 has its plan already"),
        ([plan(), load()], load(3), "loaded already; send Refresh for others"),
        ([plan()], join(2), "Join comes after Load"),
        (JOINED, join(4), "the shard has joined already"),
        ([plan()], refresh(6, sequence=2), "Refresh comes after Load"),
        (JOINED, refresh(5), "weights version 5 is not newer than 5"),
        ([*JOINED, refresh(7)], refresh(6, sequence=5), "weights version 6 is not newer than 7"),
        (JOINED, keep(6, sequence=4), "nothing would be left: here are weights versions 5"),
        ([*JOINED, drain()], join(5), "the shard is drained; a new epoch begins with Plan"),
        ([*JOINED, drain()], drain(5), "the shard is drained; a new epoch begins with Plan"),
    ],
)
def test_a_command_that_is_not_due_is_refused(
    before: Sequence[Command], command: Command, reason: str
) -> None:
    state = replay(before)
    answer = decide(state, command).answer
    assert isinstance(answer, Refusal)
    assert reason in answer.reason
    assert answer.epoch == state.epoch
    assert replay([command], state) == state


@pytest.mark.parametrize("before", [[], JOINED, [*JOINED, step(1), drain()]])
def test_the_plan_of_a_later_epoch_is_always_obeyed(before: Sequence[Command | Step]) -> None:
    state = replay(before)
    assert decide(state, plan(4)).answer is None
    state = replay([plan(4)], state)
    assert (state.epoch, state.steps, len(state.done)) == (4, 0, 1)
    assert (state.loaded, state.joined, state.drained) == (False, False, False)


def test_weights_stay_until_they_are_let_go_of() -> None:
    state = replay([*JOINED, refresh(6), refresh(9, sequence=5)])
    assert state.versions == (5, 6, 9)
    assert replay([keep(9, 6, 4, sequence=6)], state).versions == (6, 9)


@pytest.mark.parametrize(
    ("new", "kept"),
    [
        (plan(2), True),
        (plan(2, version=6), True),
        (plan(2, dtype="bfloat16"), False),
        (replace(plan(2), config_digest="def"), False),
        (replace(plan(2), rank=0), False),
        (replace(plan(2), rank=0, shards=SHARDS[::-1]), False),  # rows would go astray
        (replace(plan(2), slots=9), False),
    ],
)
def test_weights_of_the_same_part_of_the_same_model_are_kept(new: Plan, kept: bool) -> None:
    assert same_weights(plan(), new) == kept
    assert replay([*JOINED, refresh(6), new]).versions == ((5, 6) if kept else ())
    assert not same_weights(None, new)


@pytest.mark.parametrize(
    ("before", "wrong", "reason"),
    [
        ([*JOINED, plan(2)], step(1), "step of epoch 1, epoch 2 is live"),
        (JOINED, step(1, epoch=2), "step of epoch 2, epoch 1 is live"),
        ([plan(), load()], step(1), "has not joined, or is drained"),
        ([*JOINED, drain()], step(1), "has not joined, or is drained"),
        (JOINED, step(2), "step 2 came before step 1"),
        ([*JOINED, step(1)], step(4), "step 4 came before step 2"),
        ([*JOINED, refresh(6)], step(1, version=7), "weights version 7; here are 5, 6"),
        ([*JOINED, refresh(6), keep(6)], step(1), "weights version 5; here are 6"),
    ],
)
def test_a_step_that_cannot_be_run_raises(
    before: Sequence[Command | Step], wrong: Step, reason: str
) -> None:
    state = replay(before)
    with pytest.raises(ClusterError, match=reason):
        take(state, wrong)
    assert replay([wrong], state) == state


def test_a_step_is_run_once_and_a_sign_of_life_needs_no_weights() -> None:
    state = replay(JOINED)
    state, run = take(state, step(1))
    assert run
    assert take(state, step(1)) == (state, False)
    state, run = take(state, step(2, version=0, most_rows=0))
    assert run
    assert take(state, step(1)) == (state, False)
    assert state.steps == 2


@st.composite
def epochs(draw: st.DrawFn) -> list[tuple[list[Command | Step], list[Command | Step]]]:
    """By epoch: what its sender sends until it is answered, and what it then sends in vain.

    Each may end anywhere, the last once weights are loaded.
    """
    number = draw(st.integers(1, 3))
    result: list[tuple[list[Command | Step], list[Command | Step]]] = []
    for epoch in range(1, number + 1):
        messages = draw(epoch_messages(epoch))
        if epoch == number:
            result.append((messages[: draw(st.integers(2, len(messages)))], []))
        else:
            end = draw(st.integers(1, len(messages)))
            result.append((messages[:end], messages[end : end + 1]))
    return result


@st.composite
def epoch_messages(draw: st.DrawFn, epoch: int) -> list[Command | Step]:
    """Commands and steps that a shard takes, in order."""
    version = draw(st.integers(0, 9))
    here = [version]
    first = plan(epoch, version=version, dtype=draw(st.sampled_from(["float32", "bfloat16"])))
    messages: list[Command | Step] = [first, load(epoch=epoch), join(epoch=epoch)]
    commands, steps = count(4), count(1)
    kinds = st.sampled_from(["step", "sign of life", "refresh", "keep"])
    for kind in draw(st.lists(kinds, max_size=6)):
        if kind == "refresh":
            here = [*here, here[-1] + draw(st.integers(1, 3))]
            messages.append(refresh(here[-1], next(commands), epoch))
        elif kind == "keep":
            here = draw(st.lists(st.sampled_from(here), min_size=1, unique=True).map(sorted))
            messages.append(keep(*here, sequence=next(commands), epoch=epoch))
        elif kind == "step":
            messages.append(step(next(steps), draw(st.sampled_from(here)), epoch))
        else:
            messages.append(step(next(steps), 0, epoch, most_rows=0))
    if draw(st.booleans()):
        messages.append(drain(next(commands), epoch))
    return messages


troubles = st.lists(
    st.tuples(st.sampled_from(["an old one arrives", "no answer", "fails"]), st.integers(0, 99)),
    max_size=4,
)


def send_until_ready(
    member: Member, message: Command | Step, sent: list[bytes], data: st.DataObject
) -> None:
    """Over a network that loses a message or its answer, and brings whatever was sent, ever, at
    any time and any number of times."""
    letter = wire.encode(message)
    sent.append(letter)
    for trouble, which in data.draw(troubles):
        if trouble == "an old one arrives":
            member.hear(sent[which % len(sent)])
        else:
            member.hear(letter, fails=trouble == "fails")
    answer = wire.decode(member.hear(letter))
    assert answer == Ready(epoch=message.epoch, sequence=message.sequence)


@given(epochs=epochs(), data=st.data())
def test_whatever_the_network_does_the_state_is_that_of_the_clean_transcript(
    epochs: list[tuple[list[Command | Step], list[Command | Step]]], data: st.DataObject
) -> None:
    member = Member()
    sent: list[bytes] = []
    for messages, in_vain in epochs:
        for message in messages:
            send_until_ready(member, message, sent, data)
        sent += map(wire.encode, in_vain)
        for _ in range(data.draw(st.integers(0, 2))):
            member.hear(data.draw(st.sampled_from(sent)))
    clean = [message for messages, _ in epochs for message in messages]
    state = replay(clean)
    last, _ = epochs[-1]
    assert state.steps == sum(isinstance(message, Step) for message in last)
    assert [c for c, _ in state.done] == [m for m in last if not isinstance(m, Step)]
    assert member.state == state
    assert replay(member.carried_out) == state


any_message = st.one_of(
    st.builds(plan, st.integers(0, 3), st.integers(0, 2), st.integers(0, 2)),
    st.builds(load, st.integers(0, 4), st.integers(0, 3)),
    st.builds(join, st.integers(0, 5), st.integers(0, 3)),
    st.builds(refresh, st.integers(0, 5), st.integers(0, 6), st.integers(0, 3)),
    st.builds(keep, st.integers(0, 5), sequence=st.integers(0, 6), epoch=st.integers(0, 3)),
    st.builds(drain, st.integers(0, 6), st.integers(0, 3)),
    st.builds(step, st.integers(0, 4), st.integers(0, 5), st.integers(0, 3)),
)


@given(st.lists(st.one_of(any_message, st.sampled_from(JOINED)), max_size=25))
def test_a_repeated_message_changes_nothing_and_no_message_leads_back(
    messages: list[Command | Step],
) -> None:
    member = Member()
    for message in messages:
        before, letter = member.state, wire.encode(message)
        answer = member.hear(letter)
        after = member.state
        if isinstance(wire.decode(answer), Refusal):
            assert after == before
        assert member.hear(letter) == answer
        assert member.state == after
        assert after.epoch >= before.epoch
        if after.epoch == before.epoch:
            assert after.done[: len(before.done)] == before.done
            assert after.steps - before.steps in (0, 1)
        assert [c.sequence for c, _ in after.done] == list(range(1, len(after.done) + 1))
        assert after.loaded or not (after.joined or after.steps)
        assert after.versions == tuple(sorted(set(after.versions)))
    assert replay(messages) == replay(member.carried_out) == member.state


def test_a_command_that_failed_can_be_tried_again() -> None:
    member = Member(replay([plan()]))
    before = member.state
    for _ in range(2):
        answer = wire.decode(member.hear(wire.encode(load()), fails=True))
        assert answer == Failure(epoch=1, reason="no space left")
        assert member.state == before
    assert wire.decode(member.hear(wire.encode(load()))) == ready(load())
    assert member.state == replay([plan(), load()])


def test_the_answer_to_a_repeated_command_is_the_first_one() -> None:
    first = Ready(epoch=1, sequence=2, weights_bytes=70, seconds=1.5)
    state = commit(replay([plan()]), load(), first)
    assert decide(state, load()).answer == first
    assert decide(replay([join()], state), load()).answer == first
