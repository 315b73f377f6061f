"""The model behind a replica: the rows of its experts are counted wherever it lies."""

from pathlib import Path

import pytest

from gptmoe.checkpoint import save, whole
from gptmoe.config import to_dict
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import make_request
from gptmoe.model.initialize import initialize
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT
from gptmoe.text import train_jiebabpe
from serve.config import ServeConfig
from serve.core import LocalCore, by_layer

SPEC = ModelSpec(
    num_layers=4, d_model=8, num_heads=1, d_ff=16, vocab_size=320, max_seq_len=64,
    num_experts=(4, 2),
)  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    network = GPT(SPEC)
    initialize(network, seed=1)
    save(
        tmp_path / "step",
        rank=0,
        world=1,
        barrier=lambda: None,
        groups={"weights": [whole(n, p.detach()) for n, p in network.named_parameters()]},
        config={"model": to_dict(SPEC)},
        progress={"step": 1},
        copy_files=train_jiebabpe(["春风又绿江南岸"] * 4, vocab_size=270).save,
    )
    return tmp_path / "step"


def generate(core: LocalCore, tokens: int) -> None:
    engine = core.engine
    sampling = SamplingParams(max_new_tokens=tokens, temperature=0.0, ignore_end=True)
    engine.add(make_request(engine.tokenizer, SPEC.max_seq_len, "a", "春风又绿", sampling))
    while engine.has_work:
        engine.step()


def test_rows_of_experts_are_counted_with_new_weights_too(checkpoint: Path) -> None:
    core = LocalCore(ServeConfig(checkpoint=checkpoint))
    assert core.expert_rows() == {1: [0, 0, 0, 0], 3: [0, 0]}
    generate(core, 5)
    first = {layer: sum(rows) for layer, rows in core.expert_rows().items()}
    assert first[1] == first[3] >= 5  # one expert a token

    core.prepare(checkpoint, version=1)
    core.engine.refresh(1)
    generate(core, 5)
    assert {layer: sum(rows) for layer, rows in core.expert_rows().items()} == {
        layer: 2 * count for layer, count in first.items()
    }


def test_rows_that_shards_tell_of_are_put_in_place() -> None:
    assert by_layer({(1, 3): 5.0, (3, 0): 2.0}, SPEC) == {1: (0, 0, 0, 5), 3: (2, 0)}
