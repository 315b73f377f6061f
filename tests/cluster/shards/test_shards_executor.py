"""The engine's side: plans go out to shards in memory, their scores come together in order."""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cluster.messages import Message, Ready, Step, StepDone
from cluster.shards.executor import ShardsExecutor
from cluster.shards.routes import route_of
from gptmoe.errors import ClusterError
from gptmoe.generate.executor import output_rows
from gptmoe.generate.plan import Span, StepPlan
from gptmoe.model.spec import ModelSpec
from gptmoe.shard.parts import Part, arrange

VOCAB = 7
SPEC = ModelSpec(num_layers=4, d_model=8, num_heads=4, d_ff=8, num_experts=(4, 4))
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"dp": 2},
    {"dp": 3},
    {"tp": 2},
    {"pp": 2},
    {"pp": 4},
    {"dp": 2, "tp": 4, "pp": 2},
    {"dp": 2, "ep": 2, "expert_ranks": 2},
    {"dp": 2, "tp": 2, "pp": 2, "expert_ranks": 1},
]


@dataclass
class Shards:
    """A line to shards whose scores say which token they are for, and of which word."""

    parts: tuple[Part, ...]
    seconds: dict[int, tuple[float, float]] = field(default_factory=dict)
    told: dict[int, list[Step]] = field(default_factory=lambda: defaultdict(list))
    waiting: dict[int, deque[Any]] = field(default_factory=lambda: defaultdict(deque))
    journal: list[str] = field(default_factory=list)

    def send(self, message: Message, to: int) -> None:
        assert isinstance(message, Step)
        self.told[to].append(message)
        self.journal.append(f"step to {to}")
        assert self.told[to] == sorted(self.told[to], key=lambda step: step.sequence)
        rank = to
        while (target := route_of(self.parts, rank).target) != len(self.parts):
            rank = target
        if not self.parts[rank].experts_only:
            self._answer(message, rank)
        elif not message.most_rows:
            self.waiting[rank].append(StepDone(epoch=message.epoch, sequence=message.sequence))

    def receive(self, source: int) -> Message:
        self.journal.append(f"answer of {source}")
        message: Message = self.waiting[source].popleft()
        return message

    def send_tensor(self, tensor: Tensor, to: int) -> None:
        raise AssertionError("the engine sends no tensors")

    def receive_tensor(self, into: Tensor, source: int) -> Tensor:
        rows = self.waiting[source].popleft()
        assert rows.shape == into.shape
        return into.copy_(rows)

    def _answer(self, step: Step, rank: int) -> None:
        last = output_rows(torch.tensor(step.token_ids), step.spans).tolist()
        compute_s, exchange_s = self.seconds.get(rank, (0.0, 0.0))
        self.waiting[rank].append(
            StepDone(
                epoch=step.epoch,
                sequence=step.sequence,
                rows=len(last),
                compute_s=compute_s,
                exchange_s=exchange_s,
            )
        )
        if last:
            part = self.parts[rank]
            self.waiting[rank].append(scores_of(last).tensor_split(slice_ends(part), 1)[part.slice])


def slice_ends(part: Part) -> list[int]:
    return [VOCAB * index // part.slices for index in range(1, part.slices)]


def scores_of(token_ids: list[int]) -> Tensor:
    return torch.tensor(token_ids).view(-1, 1) * 100.0 + torch.arange(VOCAB)


def executor_of(line: Any) -> ShardsExecutor:
    return ShardsExecutor(line.parts, line, 5, VOCAB, torch.float32)


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    slots = draw(st.permutations(range(6)))[: draw(st.integers(1, 6))]
    num_decoding = draw(st.integers(0, len(slots)))
    spans = [Span(str(slot), slot, 9, 1, 1) for slot in sorted(slots[:num_decoding])]
    spans += [
        Span(str(slot), slot, 0, draw(st.integers(2, 150)), draw(st.booleans()))
        for slot in slots[num_decoding:]
    ]
    return StepPlan(tuple(spans), num_decoding)


TOKENS = {str(slot): [1000 * slot + place for place in range(200)] for slot in range(6)}


@given(layout=st.sampled_from(LAYOUTS), plan=plans())
def test_scores_come_together_in_the_order_of_the_plan(
    layout: dict[str, Any], plan: StepPlan
) -> None:
    line = Shards(arrange(SPEC, **layout))
    executor = executor_of(line)
    for _ in range(2):
        wanted = [
            TOKENS[span.key][span.start + span.count - 1] for span in plan.spans if span.outputs
        ]
        assert torch.equal(executor.run(plan, TOKENS), scores_of(wanted))
    assert not any(line.waiting.values())
    assert executor.costs.steps == 2


def test_slices_of_a_data_rank_get_the_same_step_and_ranks_of_experts_an_empty_one() -> None:
    line = Shards(arrange(SPEC, dp=2, tp=2, expert_ranks=1))
    plan = StepPlan((Span("0", 0, 0, 3, 1), Span("1", 1, 0, 6, 0)), 0, version=2)
    assert torch.equal(executor_of(line).run(plan, TOKENS), scores_of([2]))
    assert line.told[0] == line.told[1]
    assert line.told[2] == line.told[3]
    assert [line.told[rank][0].token_ids for rank in (0, 2)] == [
        (0, 1, 2),
        (1000, 1001, 1002, 1003, 1004, 1005),
    ]
    nothing = Step(epoch=5, sequence=1, version=2, most_rows=8, fixed=True)
    assert line.told[4] == [nothing]


def test_a_long_prompt_goes_to_a_pipeline_in_pieces_all_of_which_are_on_their_way() -> None:
    line = Shards(arrange(SPEC, pp=2))
    plan = StepPlan((Span("3", 3, 0, 180, 1),), 0, version=4)
    assert torch.equal(executor_of(line).run(plan, TOKENS), scores_of([3179]))
    assert [(len(step.token_ids), step.sequence, step.version) for step in line.told[0]] == [
        (90, 1, 4),
        (90, 2, 4),
    ]
    assert line.journal == ["step to 0"] * 2 + ["answer of 1"] * 2


def test_a_sign_of_life_is_heard_from_all_last_stages_and_ranks_of_experts() -> None:
    line = Shards(arrange(SPEC, dp=2, pp=2, expert_ranks=1))
    executor = executor_of(line)
    executor.beat()
    assert line.journal == [
        *[f"step to {rank}" for rank in (0, 1, 4, 5)],
        *[f"answer of {rank}" for rank in (2, 3, 4, 5)],
    ]
    alive = Step(epoch=5, sequence=1, version=0)
    assert dict(line.told) == {rank: [alive] for rank in (0, 1, 4, 5)}
    plan = StepPlan((Span("1", 1, 0, 3, 1),), 0)
    assert torch.equal(executor.run(plan, TOKENS), scores_of([1002]))
    assert [step.sequence for step in line.told[0]] == [1, 2]
    assert executor.costs.steps == 1


def test_a_step_costs_what_the_rank_that_computed_longest_says() -> None:
    line = Shards(arrange(SPEC, dp=2, pp=2), seconds={2: (1.0, 0.75), 3: (1.5, 0.25)})
    executor = executor_of(line)
    for _ in range(2):
        executor.run(StepPlan((Span("0", 0, 0, 3, 1),), 0), TOKENS)
    assert (executor.costs.compute_s, executor.costs.exchange_s) == (3.0, 0.5)
    assert executor.costs.total_s >= 0


@pytest.mark.parametrize(
    "wrong",
    [
        StepDone(epoch=4, sequence=1),
        StepDone(epoch=5, sequence=2),
        Ready(epoch=5, sequence=1),
    ],
)
def test_an_answer_to_something_else_is_an_error(wrong: Message) -> None:
    line = Shards(arrange(SPEC))
    line.waiting[0].append(wrong)
    executor = executor_of(line)
    with pytest.raises(ClusterError, match=rf"rank 0 answers {type(wrong).__name__}.*not step 1"):
        executor.beat()
