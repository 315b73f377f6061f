"""gptmoe.model.thresholds: a running mean of cut-offs, and who passes them."""

import pytest
import torch

from gptmoe.model.thresholds import averaged, passing


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
def test_the_average_is_the_bias_corrected_exponential_one(decay: float) -> None:
    generator = torch.Generator().manual_seed(1)
    cutoffs = torch.rand(20, 3, generator=generator, dtype=torch.float64)
    found, moment = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for update, cutoff_E in enumerate(cutoffs, 1):
        found = averaged(found, cutoff_E, update, decay)
        moment = decay * moment + (1 - decay) * cutoff_E
        torch.testing.assert_close(found, moment / (1 - decay**update))


def test_the_first_cut_off_counts_alone() -> None:
    first_E = torch.tensor([0.25, 0.5], dtype=torch.float64)
    found_E = averaged(torch.zeros(2), first_E, 1, 0.99)
    assert found_E.dtype == torch.float32
    assert found_E.tolist() == [0.25, 0.5]


def test_a_score_at_the_threshold_passes_and_padding_never_does() -> None:
    score_TE = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
    threshold_E = torch.tensor([0.5, 0.5])
    taken = passing(score_TE, threshold_E, None)
    assert taken.tolist() == [[False, True], [True, True], [True, False]]
    taken = passing(score_TE, threshold_E, torch.tensor([True, False, True]))
    assert taken.tolist() == [[False, True], [False, False], [True, False]]
