"""A shard's loop over a line in memory: what comes in, what goes on, and to whom."""

from collections import defaultdict, deque
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.messages import Drain, Message, Span, Step, StepDone
from cluster.shards.routes import route_of
from cluster.shards.step_loop import run_steps
from gptmoe.errors import ClusterError
from gptmoe.model.spec import ModelSpec
from gptmoe.shard.parts import Part, arrange
from gptmoe.shard.shard import Spent

SPEC = ModelSpec(num_layers=4, d_model=2, num_heads=2, d_ff=4, num_experts=(2, 2))
STEP = Step(
    epoch=3,
    sequence=1,
    version=0,
    spans=(Span(slot=0, start=0, count=3, outputs=1),),
    token_ids=(11, 12, 13),
    most_rows=4,
)
NOTHING = Step(epoch=3, sequence=2, version=0, most_rows=4)
SIGN_OF_LIFE = Step(epoch=3, sequence=3, version=0)
HIDDEN = torch.arange(6.0).view(3, 2)
SCORES = torch.tensor([[7.0, 8.0, 9.0]])


@dataclass
class Line:
    """What each source has sent; when it has no more, it is lost."""

    inbox: dict[int, deque[Any]] = field(default_factory=lambda: defaultdict(deque))
    sent: list[tuple[int, Any]] = field(default_factory=list)

    def send(self, message: Message, to: int) -> None:
        self.sent.append((to, message))

    def receive(self, source: int) -> Message:
        if not self.inbox[source]:
            raise ClusterError(f"rank {source} is lost")
        message: Message = self.inbox[source].popleft()
        return message

    def send_tensor(self, tensor: Tensor, to: int) -> None:
        self.sent.append((to, tensor.tolist()))

    def receive_tensor(self, into: Tensor, source: int) -> Tensor:
        return into.copy_(self.inbox[source].popleft())


@dataclass
class Stage:
    """What the loop needs of Shard."""

    parts: tuple[Part, ...]
    rank: int
    out: Tensor
    ran: list[tuple[Step, Any]] = field(default_factory=list)
    spec = SPEC
    dtype = torch.float32
    device = torch.device("cpu")

    @property
    def part(self) -> Part:
        return self.parts[self.rank]

    @property
    def is_first(self) -> bool:
        return self.part.stage == 0

    @property
    def is_last(self) -> bool:
        return self.part.stage == max(part.stage for part in self.parts)

    def run(self, step: Step, x_TD: Tensor | None) -> tuple[Tensor, Spent]:
        self.ran.append((step, None if x_TD is None else x_TD.tolist()))
        rows = self.out if step.token_ids else self.out[:0]
        return rows, Spent(compute_s=1.5, exchange_s=0.5)


def run(stage: Any, line: Line, *incoming: Any) -> None:
    """Until the source of the shard has no more to say."""
    route = route_of(stage.parts, stage.rank)
    line.inbox[route.source].extend(incoming)
    with pytest.raises(ClusterError, match=f"rank {route.source} is lost"):
        run_steps(stage, line, route, lambda step: True)


def done(step: Step, rows: int) -> StepDone:
    return StepDone(
        epoch=step.epoch, sequence=step.sequence, rows=rows, compute_s=1.5, exchange_s=0.5
    )


def costing(step: Step) -> Step:
    """As the first stage hands it on."""
    return replace(step, compute_s=1.5, exchange_s=0.5)


def test_one_stage_runs_steps_and_answers_with_scores() -> None:
    stage, line = Stage(arrange(SPEC), 0, SCORES), Line()
    run(stage, line, STEP, NOTHING)
    assert stage.ran == [(STEP, None), (NOTHING, None)]
    assert line.sent == [(1, done(STEP, 1)), (1, SCORES.tolist()), (1, done(NOTHING, 0))]


def test_a_step_that_samples_nothing_has_no_scores_behind_it() -> None:
    stage, line = Stage(arrange(SPEC), 0, SCORES[:0]), Line()
    run(stage, line, STEP)
    assert line.sent == [(1, done(STEP, 0))]


def test_the_first_stage_sends_the_step_with_its_costs_ahead_of_its_hidden_states() -> None:
    stage, line = Stage(arrange(SPEC, pp=2), 0, HIDDEN), Line()
    run(stage, line, STEP, NOTHING)
    assert stage.ran == [(STEP, None), (NOTHING, None)]
    assert line.sent == [(1, costing(STEP)), (1, HIDDEN.tolist()), (1, costing(NOTHING))]


def test_costs_of_stages_add_up() -> None:
    stage, line = Stage(arrange(SPEC, pp=2), 1, SCORES), Line()
    run(stage, line, costing(STEP), HIDDEN)
    said = line.sent[0][1]
    assert (said.compute_s, said.exchange_s) == (3.0, 1.0)


def test_a_stage_between_takes_hidden_states_and_hands_them_on() -> None:
    stage, line = Stage(arrange(SPEC, pp=4), 1, HIDDEN + 10), Line()
    run(stage, line, STEP, HIDDEN, NOTHING)
    assert stage.ran == [(STEP, HIDDEN.tolist()), (NOTHING, None)]
    assert line.sent == [(2, costing(STEP)), (2, (HIDDEN + 10).tolist()), (2, costing(NOTHING))]


def test_the_last_stage_answers_the_engine() -> None:
    stage, line = Stage(arrange(SPEC, pp=2, dp=2), 3, SCORES), Line()
    run(stage, line, STEP, HIDDEN, NOTHING)
    assert stage.ran == [(STEP, HIDDEN.tolist()), (NOTHING, None)]
    assert line.sent == [(4, done(STEP, 1)), (4, SCORES.tolist()), (4, done(NOTHING, 0))]


@pytest.mark.parametrize("rank", [2, 3])
def test_a_rank_of_experts_alone_takes_part_and_says_nothing(rank: int) -> None:
    stage, line = Stage(arrange(SPEC, pp=2, expert_ranks=1), rank, HIDDEN[:0]), Line()
    run(stage, line, NOTHING, STEP)
    assert stage.ran == [(NOTHING, None), (STEP, None)]
    assert line.sent == []


@pytest.mark.parametrize(
    ("rank", "target", "answers"),
    [(0, 1, False), (1, 4, True), (2, 4, True), (3, 4, True)],
)
def test_a_sign_of_life_travels_through_the_stages_and_is_not_run(
    rank: int, target: int, answers: bool
) -> None:
    stage, line = Stage(arrange(SPEC, pp=2, expert_ranks=1), rank, HIDDEN), Line()
    run(stage, line, SIGN_OF_LIFE)
    assert stage.ran == []
    alive = StepDone(epoch=3, sequence=3)
    assert line.sent == [(target, alive if answers else SIGN_OF_LIFE)]


def test_a_step_seen_before_is_neither_run_nor_handed_on() -> None:
    stage: Any = Stage(arrange(SPEC, pp=2), 0, HIDDEN)
    line, asked = Line(), []

    def accept(step: Step) -> bool:
        asked.append(step)
        return len(asked) != 2

    line.inbox[2].extend([STEP, STEP, NOTHING])
    with pytest.raises(ClusterError, match="rank 2 is lost"):
        run_steps(stage, line, route_of(stage.parts, 0), accept)
    assert asked == [STEP, STEP, NOTHING]
    assert [step for step, _ in stage.ran] == [STEP, NOTHING]
    assert line.sent == [(1, costing(STEP)), (1, HIDDEN.tolist()), (1, costing(NOTHING))]


def test_a_step_that_is_not_accepted_ends_the_loop() -> None:
    stage: Any = Stage(arrange(SPEC), 0, SCORES)
    line = Line()
    line.inbox[1].append(STEP)

    def accept(step: Step) -> bool:
        raise ClusterError("step 1 came before step 0")

    with pytest.raises(ClusterError, match="step 1 came before step 0"):
        run_steps(stage, line, route_of(stage.parts, 0), accept)
    assert (stage.ran, line.sent) == ([], [])


def test_anything_but_a_step_ends_the_loop() -> None:
    stage: Any = SimpleNamespace()
    line = Line()
    line.inbox[1].append(Drain(epoch=1, sequence=4))
    with pytest.raises(ClusterError, match="a shard takes steps here, found a Drain"):
        run_steps(stage, line, route_of(arrange(SPEC), 0), lambda step: True)
