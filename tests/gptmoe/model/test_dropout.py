"""gptmoe.model.dropout: masks that belong to samples, not to ranks or batches."""

import dataclasses

import pytest
import torch

from gptmoe.model.dropout import SampleDropout
from gptmoe.model.initialize import initialize
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT

DROP = SampleDropout(probability=0.25, seed=1, step=2, first_sample=8, length=16)
ONES = torch.ones(4, 16, 64)


def test_it_drops_its_share_and_scales_up_the_rest() -> None:
    dropped = DROP(ONES, 0, "ffn")
    kept = dropped != 0
    assert 1 - kept.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(dropped[kept], torch.full_like(dropped[kept], 1 / 0.75))
    assert DROP(ONES.double(), 0, "ffn").dtype == torch.float64


def test_a_mask_does_not_depend_on_the_batch_or_on_the_slice_of_the_sequence() -> None:
    whole = DROP(ONES, 3, "attention")
    for sample in range(4):
        alone = dataclasses.replace(DROP, first_sample=8 + sample)
        assert torch.equal(alone(ONES[:1], 3, "attention"), whole[sample : sample + 1])
    for first, stop in ((0, 4), (4, 16)):
        part = dataclasses.replace(DROP, first_position=first)
        assert torch.equal(part(ONES[:, first:stop], 3, "attention"), whole[:, first:stop])


def test_masks_differ_by_seed_step_layer_part_and_sample() -> None:
    masks = [
        DROP(ONES, 3, "ffn"),
        DROP(ONES, 4, "ffn"),
        DROP(ONES, 3, "attention"),
        *(
            dataclasses.replace(DROP, **{key: getattr(DROP, key) + 100})(ONES, 3, "ffn")
            for key in ("seed", "step", "first_sample")
        ),
    ]
    samples = [mask[0] for mask in masks] + [masks[0][1]]
    assert len({sample.numpy().tobytes() for sample in samples}) == len(samples)


def test_the_model_drops_on_each_sub_layer_what_its_argument_drops_and_nothing_else() -> None:
    spec = ModelSpec(num_layers=2, d_model=32, num_heads=4, d_ff=64, vocab_size=101, max_seq_len=16)
    model = GPT(spec)
    initialize(model, 1)
    token_BT = torch.randint(101, (4, 16), generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, str]] = []

    def note(x_BTD: torch.Tensor, layer: int, part: str) -> torch.Tensor:
        seen.append((layer, part))
        return x_BTD

    assert torch.equal(model(token_BT, drop=note).hidden_BTD, model(token_BT).hidden_BTD)
    assert seen == [(-1, "sum"), (0, "attention"), (0, "ffn"), (1, "attention"), (1, "ffn")]
    assert not torch.equal(model(token_BT, drop=DROP).hidden_BTD, model(token_BT).hidden_BTD)
