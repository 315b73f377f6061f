"""gptmoe.model.loss: negative log-likelihood in at least float32.  Letters: B, T, V."""

import math

import pytest
import torch

from gptmoe.model.loss import token_losses, weighted_sum


def test_token_losses_by_hand() -> None:
    logits_NV = torch.tensor([[0.0, 1.0, 2.0], [5.0, -1.0, 0.5]], dtype=torch.float64)
    expected = [
        math.log(sum(map(math.exp, row))) - row[label]
        for row, label in zip(logits_NV.tolist(), [2, 1], strict=True)
    ]
    assert token_losses(logits_NV, torch.tensor([2, 1])).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_computed_in_at_least_float32(dtype: torch.dtype, wide: torch.dtype) -> None:
    logits_NV = torch.linspace(-3, 3, 40).view(4, 10).to(dtype)
    label_N = torch.tensor([0, 3, 6, 9])
    losses_N = token_losses(logits_NV, label_N)
    assert losses_N.dtype == wide
    expected_N = -logits_NV.double().log_softmax(-1)[range(4), label_N]
    torch.testing.assert_close(losses_N.double(), expected_N, rtol=1e-6, atol=1e-6)


def test_only_weighted_labels_count() -> None:
    logits_BTV = torch.linspace(-2, 2, 30, dtype=torch.float64).view(2, 3, 5).requires_grad_()
    label_BT = torch.tensor([[0, 1, 2], [3, 4, 0]])
    weight_BT = torch.tensor([[True, False, True], [False, False, True]])
    loss = weighted_sum(token_losses(logits_BTV.flatten(0, 1), label_BT.flatten()), weight_BT)
    chosen = token_losses(logits_BTV[weight_BT], label_BT[weight_BT])
    torch.testing.assert_close(loss, chosen.sum())
    (gradient_BTV,) = torch.autograd.grad(loss, logits_BTV)
    assert torch.equal(gradient_BTV.any(-1), weight_BT)


def test_no_weighted_label_costs_nothing_and_stays_in_the_graph() -> None:
    logits_BTV = torch.zeros(1, 2, 3, requires_grad=True)
    loss = weighted_sum(
        token_losses(logits_BTV.flatten(0, 1), torch.zeros(2).long()), torch.zeros(1, 2).bool()
    )
    (gradient_BTV,) = torch.autograd.grad(loss, logits_BTV)
    assert loss.item() == 0
    assert not gradient_BTV.any()
