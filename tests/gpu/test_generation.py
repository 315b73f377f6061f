"""What only a GPU can show of generation: compiled kernels, captured steps, invariant bits."""

import threading
from copy import deepcopy
from typing import cast

import pytest
import torch

from gptmoe.generate import gpu
from gptmoe.generate.executor import LocalExecutor, WholeModel
from gptmoe.generate.gpu.executor import PagedExecutor
from gptmoe.generate.plan import Span, StepPlan
from gptmoe.generate.slots import blocks_of
from gptmoe.model.initialize import initialize
from gptmoe.model.moe import MoE
from gptmoe.model.spec import ModelSpec, RouterKind, RouterSpec
from gptmoe.model.transformer import GPT
from gptmoe.stored import kept_dtype
from tests.small_model import draw_biases

CONTEXT, SLOTS = 640, 9
LENGTHS = (1, 15, 16, 17, 64, 255, 256, 300, 500)
STEPS = 8


def network(dtype: torch.dtype, kind: RouterKind = "switch") -> GPT:
    spec = ModelSpec(
        num_layers=4,
        d_model=256,
        num_heads=4,
        d_ff=1024,
        vocab_size=1000,
        max_seq_len=CONTEXT,
        num_experts=(8, 8),
        init_std=0.1,
        router=RouterSpec(kind=kind),
    )
    made = GPT(spec, compute_dtype=dtype)
    initialize(made, seed=3)
    draw_biases(made)
    return made.requires_grad_(False).eval()


def on_gpu(model: GPT, *, invariant: bool = False, slots: int = SLOTS) -> PagedExecutor:
    model = deepcopy(model).to("cuda")
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(kept_dtype(name, model.compute_dtype))
    executors = gpu.executors(model, invariant=invariant)
    return cast(PagedExecutor, executors(model, slots, slots * blocks_of(CONTEXT)))


def prompts() -> dict[str, list[int]]:
    random = torch.Generator().manual_seed(1)
    return {
        str(slot): torch.randint(1000, (length,), generator=random).tolist()
        for slot, length in enumerate(LENGTHS)
    }


def scores(
    executor: WholeModel, names: list[str], chunk: int = 1000, version: int = 0
) -> dict[str, list[torch.Tensor]]:
    """Of greedy steps of these prompts together, which enter in chunks."""
    tokens = {name: list(ids) for name, ids in prompts().items() if name in names}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    done = dict.fromkeys(names, 0)
    while min(map(len, found.values())) < STEPS:
        spans = []
        for name in names:
            count = min(len(tokens[name]) - done[name], chunk)
            ends = done[name] + count == len(tokens[name])
            spans.append(Span(name, int(name), done[name], count, int(ends)))
            done[name] += count
        spans.sort(key=lambda span: span.count > 1)
        decoding = sum(span.count == 1 for span in spans)
        rows = iter(executor.run(StepPlan(tuple(spans), decoding, version), tokens))
        for span in spans:
            if span.outputs:
                logits_V = next(rows).float()
                found[span.key].append(logits_V)
                tokens[span.key].append(int(logits_V.argmax()))
    return {name: found[name][:STEPS] for name in names}


EVERY = list(prompts())


@pytest.mark.parametrize(
    ("kind", "invariant"),
    [("switch", False), ("switch", True), ("top2", True), ("expert_choice", False)],
)
def test_a_gpu_says_what_a_cpu_says(kind: RouterKind, invariant: bool) -> None:
    model = network(torch.float32, kind)
    expected = scores(LocalExecutor(model, SLOTS), EVERY)
    found = scores(on_gpu(model, invariant=invariant), EVERY, chunk=100)
    for name in EVERY:
        for mine, other in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.float32, "switch"),
        (torch.bfloat16, "switch"),
        (torch.bfloat16, "top2"),
        (torch.bfloat16, "s_base"),
        (torch.bfloat16, "loss_free"),
    ],
)
def test_bits_alone_and_in_any_batch_and_chunking(dtype: torch.dtype, kind: RouterKind) -> None:
    executor = on_gpu(network(dtype, kind), invariant=True)
    together = scores(executor, EVERY)
    for chunk in (1000, 37):
        for name in EVERY:
            alone = scores(executor, [name], chunk)[name]
            assert all(map(torch.equal, alone, together[name])), (name, chunk)


@pytest.mark.parametrize("invariant", [False, True])
def test_a_captured_step_has_the_bits_of_an_uncaptured_one(invariant: bool) -> None:
    executor = on_gpu(network(torch.bfloat16), invariant=invariant)
    captured = scores(executor, EVERY[:8])  # a graph without padding
    executor.forget_graphs()
    uncaptured = scores(executor, EVERY[:8])
    for name in EVERY[:8]:
        assert all(map(torch.equal, captured[name], uncaptured[name]))


def test_tokens_that_no_expert_takes_have_scores() -> None:
    executor = on_gpu(network(torch.bfloat16, "expert_choice"))
    for rows in scores(executor, EVERY).values():
        assert all(bool(logits_V.isfinite().all()) for logits_V in rows)


def test_experts_answer_all_rows_and_no_padding() -> None:
    executor = on_gpu(network(torch.bfloat16))
    counts = [m.count_rows() for m in executor.model.modules() if isinstance(m, MoE)]
    scores(executor, EVERY)
    rows = sum(LENGTHS) + (STEPS - 1) * len(EVERY)
    assert [sum(read()) for read in counts] == [rows, rows]


def test_graphs_of_more_rows_than_experts_take_at_once_are_captured() -> None:
    executor = on_gpu(network(torch.bfloat16), slots=80)
    executor.warm_up()
    assert scores(executor, EVERY)


def test_older_weights_can_go_while_newer_ones_are_replayed() -> None:
    """Each captured in a thread that ends, as a replica does it."""
    executor = on_gpu(network(torch.bfloat16))
    executor.warm_up()
    expected = scores(executor, EVERY)
    for version in (1, 2, 3):
        newer = on_gpu(network(torch.bfloat16)).model
        thread = threading.Thread(target=executor.add, args=(version, newer))
        thread.start()
        while thread.is_alive():
            scores(executor, EVERY[:2], version=version - 1)
        thread.join()
        executor.keep({version})
        found = scores(executor, EVERY, version=version)
        for name in EVERY:
            assert all(map(torch.equal, found[name], expected[name]))
