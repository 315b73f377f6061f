"""A shard's side of the control protocol: which command it obeys, which step it runs. Pure.

    Plan -> Load -> Join -> Refresh, Keep ... -> Drain  the commands of one epoch, numbered from 1
                    Step 1, 2, 3, ...                 between Join and Drain

    of a dead epoch                refused
    of a later epoch               Plan number 1 is obeyed, all else refused: send Plan first
    number seen before             the same answer again, nothing is done; another command: refused
    number not yet due             refused: the one before it is missing
    out of order for its kind      refused: Load after Plan, Join after Load, ...

Whatever the network loses, repeats or reorders, a sender that sends a command again until it has an
answer brings the shard to the same state (tests/cluster/shards/test_member.py). `decide` looks,
the actor acts, `commit` remembers: a command that failed leaves the state as it was.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cluster.messages import (
    Command,
    Drain,
    Join,
    Keep,
    Load,
    Message,
    Plan,
    Ready,
    Refresh,
    Refusal,
    Step,
)
from gptmoe.errors import ClusterError

COMMANDS = (Plan, Load, Join, Refresh, Keep, Drain)


@dataclass(frozen=True, slots=True)
class State:
    """What a shard knows. Invariant: `done` commands of `epoch` were carried out, `steps` steps."""

    epoch: int = 0
    plan: Plan | None = None
    done: tuple[tuple[Command, Message], ...] = ()
    """The commands of this epoch with their answers."""
    loaded: bool = False
    joined: bool = False
    drained: bool = False
    versions: tuple[int, ...] = ()
    """Of the weights that are here."""
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a command: carry it out if there is no answer yet, else answer only."""

    answer: Message | None


def decide(state: State, command: Command) -> Verdict:
    """Whether to carry out a command, by the table above."""
    if command.epoch < state.epoch:
        return _refuse(state, f"epoch {command.epoch} is over, epoch {state.epoch} is live")
    if command.epoch > state.epoch:
        if isinstance(command, Plan) and command.sequence == 1:
            return Verdict(None)
        return _refuse(state, f"epoch {command.epoch} has no plan here; send Plan first")
    number, due = command.sequence, len(state.done) + 1
    if 0 < number < due:
        seen, answer = state.done[number - 1]
        if seen == command:
            return Verdict(answer)
        return _refuse(state, f"command {number} was another one: {type(seen).__name__}")
    if number != due:
        return _refuse(state, f"command {number} came before command {due}, which is missing")
    wrong = _wrong(state, command)
    return _refuse(state, wrong) if wrong else Verdict(None)


def commit(state: State, command: Command, answer: Message) -> State:
    """The state after a command was carried out with this answer."""
    if isinstance(command, Plan):
        kept = same_weights(state.plan, command)
        return State(
            epoch=command.epoch,
            plan=command,
            done=((command, answer),),
            versions=state.versions if kept else (),
        )
    state = replace(state, done=(*state.done, (command, answer)))
    match command:
        case Load():
            assert state.plan is not None
            return replace(state, loaded=True, versions=(state.plan.version,))
        case Join():
            return replace(state, joined=True)
        case Refresh():
            return replace(state, versions=(*state.versions, command.version))
        case Keep():
            left = tuple(v for v in state.versions if v in command.versions)
            return replace(state, versions=left)
    return replace(state, drained=True)


def take(state: State, step: Step) -> tuple[State, bool]:
    """The state after a step, and whether it is to be run: not if it was before.

    Raises ClusterError for a step of another epoch, before its turn, or of weights not here.
    """
    if step.epoch != state.epoch:
        raise ClusterError(f"step of epoch {step.epoch}, epoch {state.epoch} is live")
    if not state.joined or state.drained:
        raise ClusterError("step for a shard that has not joined, or is drained")
    if step.sequence <= state.steps:
        return state, False
    if step.sequence > state.steps + 1:
        raise ClusterError(f"step {step.sequence} came before step {state.steps + 1}")
    if step.most_rows and step.version not in state.versions:
        here = ", ".join(map(str, state.versions))
        raise ClusterError(f"step of weights version {step.version}; here are {here}")
    return replace(state, steps=step.sequence), True


def replay(messages: Iterable[Command | Step], state: State | None = None) -> State:
    """The state after a transcript, all commands carried out; refused messages change nothing."""
    state = state or State()
    for message in messages:
        if isinstance(message, Step):
            try:
                state, _ = take(state, message)
            except ClusterError:
                continue
        elif decide(state, message).answer is None:
            ready = Ready(epoch=message.epoch, sequence=message.sequence)
            state = commit(state, message, ready)
    return state


def same_weights(old: Plan | None, new: Plan) -> bool:
    """Whether the shard made for one plan serves the other: all but epoch and weights equal."""
    if old is None:
        return False
    alike = replace(old, epoch=new.epoch, group=new.group, threads=new.threads)
    return replace(alike, checkpoint=new.checkpoint, version=new.version) == new


def _wrong(state: State, command: Command) -> str:
    """Why a command is not due; empty if it is."""
    if state.plan is None:
        return "epoch 0 has no plan; a new epoch begins with Plan"
    if state.drained:
        return "the shard is drained; a new epoch begins with Plan"
    match command:
        case Plan():
            return f"epoch {state.epoch} has its plan already"
        case Load() if state.loaded:
            return "the weights of the plan are loaded already; send Refresh for others"
        case Join() if not state.loaded:
            return "Join comes after Load"
        case Join() if state.joined:
            return "the shard has joined already"
        case Refresh() if not state.loaded:
            return "Refresh comes after Load"
        case Refresh() if state.versions and command.version <= state.versions[-1]:
            return f"weights version {command.version} is not newer than {state.versions[-1]}"
        case Keep() if not set(command.versions) & set(state.versions):
            here = ", ".join(map(str, state.versions))
            return f"nothing would be left: here are weights versions {here}"
    return ""


def _refuse(state: State, reason: str) -> Verdict:
    return Verdict(Refusal(epoch=state.epoch, reason=reason))
