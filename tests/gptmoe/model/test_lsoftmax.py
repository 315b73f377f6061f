"""gptmoe.model.lsoftmax: against the formula of the angle and against finite differences.

Letters: T tokens, D model width, E classes.
"""

import math

import pytest
import torch
from torch import Tensor

from gptmoe.model.lsoftmax import MARGINS, annealed, margin_losses, psi


def psi_of_angle(theta: float, margin: int) -> float:
    """(-1)^k cos(m theta) - 2k, k the part of [0, pi] that theta lies in."""
    k = min(int(theta * margin / math.pi), margin - 1)
    return (-1.0) ** k * math.cos(margin * theta) - 2 * k


def tensors(tokens: int = 7, width: int = 5, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    h_TD = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight_ED = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    return h_TD, weight_ED, torch.randint(classes, (tokens,), generator=generator)


def losses(h_TD: Tensor, weight_ED: Tensor, target_T: Tensor, margin: int, ease: float) -> Tensor:
    return margin_losses(h_TD @ weight_ED.t(), h_TD, weight_ED, target_T, margin=margin, ease=ease)


def naive(h_TD: Tensor, weight_ED: Tensor, target_T: Tensor, margin: int, ease: float) -> Tensor:
    found = []
    for h_D, target in zip(h_TD, target_T.tolist(), strict=True):
        logits = [float(w_D @ h_D) for w_D in weight_ED]
        length = float(weight_ED[target].norm() * h_D.norm())
        theta = math.acos(max(-1.0, min(1.0, logits[target] / length)))
        hard = length * psi_of_angle(theta, margin)
        logits[target] = (ease * logits[target] + hard) / (1 + ease)
        found.append(math.log(sum(map(math.exp, logits))) - logits[target])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("margin", MARGINS)
def test_psi_is_the_formula_of_the_angle(margin: int) -> None:
    theta = torch.linspace(0.001, math.pi - 0.001, 997, dtype=torch.float64)
    expected = torch.tensor([psi_of_angle(angle, margin) for angle in theta.tolist()])
    torch.testing.assert_close(psi(theta.cos(), margin).float(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("margin", MARGINS)
def test_psi_falls_without_a_jump_from_1_to_1_minus_2m(margin: int) -> None:
    theta = torch.linspace(0, math.pi, 10_001, dtype=torch.float64)
    value = psi(theta.cos(), margin)
    assert float(value[0]) == pytest.approx(1)
    assert float(value[-1]) == pytest.approx(1 - 2 * margin)
    steps = value.diff()
    assert float(steps.max()) <= 1e-9
    assert float(steps.min()) > -0.01
    assert bool((value <= theta.cos() + 1e-12).all())


def test_psi_of_a_rounded_cosine_beyond_1_is_that_of_1() -> None:
    assert psi(torch.tensor([1 + 1e-6, -1 - 1e-6]), 2).tolist() == [1, -3]


def test_margin_1_is_the_plain_cross_entropy() -> None:
    h_TD, weight_ED, target_T = tensors()
    plain_T = torch.nn.functional.cross_entropy(h_TD @ weight_ED.t(), target_T, reduction="none")
    torch.testing.assert_close(losses(h_TD, weight_ED, target_T, 1, 0.0), plain_T)


@pytest.mark.parametrize("ease", [0.0, 5.0])
@pytest.mark.parametrize("margin", MARGINS)
def test_losses_are_those_of_a_plain_loop(margin: int, ease: float) -> None:
    given = tensors(tokens=40)
    torch.testing.assert_close(losses(*given, margin, ease), naive(*given, margin, ease))


@pytest.mark.parametrize("margin", MARGINS)
def test_gradients_are_those_of_finite_differences(margin: int) -> None:
    h_TD, weight_ED, target_T = tensors()
    h_TD.requires_grad_()
    weight_ED.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: losses(h, w, target_T, margin, 1.5), (h_TD, weight_ED)
    )


def test_a_margin_makes_it_harder_and_ease_softer() -> None:
    given = tensors(tokens=40)
    hard = [float(losses(*given, margin, 0.0).mean()) for margin in MARGINS]
    assert hard == sorted(hard)
    assert float(losses(*given, 4, 20.0).mean()) < hard[-1]


def test_a_token_of_zeros_has_a_loss_and_gradients() -> None:
    h_TD, weight_ED, target_T = tensors()
    h_TD[0] = 0
    h_TD.requires_grad_()
    found_T = losses(h_TD, weight_ED, target_T, 2, 5.0)
    found_T.sum().backward()  # type: ignore[no-untyped-call]
    assert float(found_T[0].detach()) == pytest.approx(math.log(len(weight_ED)))
    assert h_TD.grad is not None
    assert bool(h_TD.grad.isfinite().all())


def test_ease_falls_with_optimizer_steps_to_its_floor() -> None:
    eases = [annealed(100.0, 0.9, 5.0, step) for step in (0, 1, 10, 1000)]
    assert eases == pytest.approx([100, 90, 100 * 0.9**10, 5])
