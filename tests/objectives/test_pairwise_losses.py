"""Each loss of a pair against its formula, written here a second time in float64, and what its paper says of it."""

from __future__ import annotations

import math

import pytest
import torch

from trl_diffusion.objectives.pairwise import LOSSES, PairwiseConfig, Responses, make_pairs, pairwise_loss


BETA, SMOOTHING = 0.3, 0.2
SCORES = torch.tensor([[0.0, 1.0, 0.5], [3.0, -1.0, 2.0]])
CHOSEN, REJECTED = torch.tensor([1, 3]), torch.tensor([0, 4])  # the best and the worst of each group


def plain(name: str, beta: float, smoothing: float, normalize: bool, chosen, rejected, logp, lengths):
    """The loss of one pair: log-ratios of both, log-likelihood of the chosen one, lengths of both; all in float64."""
    means = chosen / lengths[0], rejected / lengths[1]
    margin = beta * (means[0] - means[1] if normalize else chosen - rejected)
    log_right, log_wrong = -torch.log(1 + torch.exp(-margin)), -torch.log(1 + torch.exp(margin))
    if name == "sigmoid":
        return -log_right
    if name == "robust":
        return (-(1 - smoothing) * log_right + smoothing * log_wrong) / (1 - 2 * smoothing)
    if name == "hinge":
        return torch.maximum(1 - margin, torch.zeros_like(margin))
    if name == "ipo":
        return (means[0] - means[1] - 0.5 / beta) ** 2
    assert name == "sft"
    return -logp / lengths[0]


def numbers():
    generator = torch.Generator().manual_seed(0)
    logps, log_ratios = (scale * torch.randn(6, generator=generator) for scale in (20.0, 3.0))
    return logps.requires_grad_(), log_ratios.requires_grad_(), torch.tensor([3, 17, 5, 9, 1, 4])


def loss_of(losses, logps, log_ratios, lengths, **options):
    config = PairwiseConfig(losses, beta=BETA, **options)
    return pairwise_loss(Responses(logps, log_ratios, lengths), make_pairs(SCORES), config)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", list(LOSSES))
def test_formula_and_gradient(name, normalize):
    logps, log_ratios, lengths = numbers()
    loss, sums = loss_of(
        {name: 1.0}, logps, log_ratios, lengths, label_smoothing=SMOOTHING, length_normalization=normalize
    )
    loss.backward()
    exact = [values.detach().double().requires_grad_() for values in (logps, log_ratios)]
    each = [
        plain(name, BETA, SMOOTHING, normalize, exact[1][a], exact[1][b], exact[0][a], (lengths[a], lengths[b]))
        for a, b in zip(CHOSEN, REJECTED, strict=True)
    ]
    wanted = sum(each) / len(each)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert sums[f"losses/{name}"].item() == pytest.approx(sum(each).item(), rel=1e-5)
    for found, expected in zip((logps, log_ratios), exact, strict=True):
        expected = torch.zeros(6) if expected.grad is None else expected.grad.float()
        found = torch.zeros(6) if found.grad is None else found.grad
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_weights_combine_linearly():
    weights = {name: 0.5 + place for place, name in enumerate(LOSSES)}
    whole = loss_of(weights, *numbers(), label_smoothing=SMOOTHING)[0]
    parts = [loss_of({name: 1.0}, *numbers(), label_smoothing=SMOOTHING)[0] for name in LOSSES]
    expected = sum(weight * part.item() for weight, part in zip(weights.values(), parts, strict=True))
    assert whole.item() == pytest.approx(expected, rel=1e-5)


def pair_loss(name: str, margin, beta: float = BETA, smoothing: float = 0.0):
    """The loss of one pair of one token each, whose log-ratios differ by `margin`."""
    log_ratios = torch.stack([torch.as_tensor(margin), torch.tensor(0.0)])
    config = PairwiseConfig({name: 1.0}, beta=beta, label_smoothing=smoothing)
    pairs = make_pairs(torch.tensor([[1.0, 0.0]]))
    return pairwise_loss(Responses(torch.zeros(2), log_ratios, torch.ones(2)), pairs, config)[0]


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_ipo_is_least_at_its_margin(beta):
    """0 at `1 / (2 beta)`, with no slope there, and as much above it on either side."""
    margin = torch.tensor(1 / (2 * beta), requires_grad=True)
    loss = pair_loss("ipo", margin, beta)
    loss.backward()
    assert abs(loss.item()) < 1e-10 and abs(margin.grad.item()) < 1e-5
    at = margin.item()
    sides = [pair_loss("ipo", at + step, beta).item() for step in (-0.5, 0.5)]
    assert sides == pytest.approx([0.25, 0.25], rel=1e-4)


@pytest.mark.parametrize("margin", [-4.0, -0.3, 0.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_robust_is_unbiased_under_wrong_orders(margin, smoothing):
    """In the mean over the orders in which a pair may have come, it is the loss of the right order."""
    right, wrong = (pair_loss("robust", sign * margin, smoothing=smoothing).item() for sign in (1, -1))
    clean = pair_loss("sigmoid", margin).item()
    assert (1 - smoothing) * right + smoothing * wrong == pytest.approx(clean, rel=1e-4, abs=1e-5)


def test_symmetric_cases():
    """Without smoothing, robust is sigmoid. At margin 0 nothing is known, whatever the smoothing."""
    for margin in (-2.0, 0.5):
        assert pair_loss("robust", margin).item() == pytest.approx(pair_loss("sigmoid", margin).item(), rel=1e-6)
        # Both orders of a pair, `-log s(m)` and `-log s(-m)`, differ by the margin itself.
        difference = pair_loss("sigmoid", -margin).item() - pair_loss("sigmoid", margin).item()
        assert difference == pytest.approx(BETA * margin, rel=1e-5)
    for smoothing in (0.0, 0.1, 0.4):
        assert pair_loss("robust", 0.0, smoothing=smoothing).item() == pytest.approx(math.log(2), rel=1e-5)


def test_hinge_stops_at_a_margin_of_one():
    for margin, slope in ((0.9 / BETA, -BETA), (1.1 / BETA, 0.0)):
        at = torch.tensor(margin, requires_grad=True)
        pair_loss("hinge", at).backward()
        assert at.grad.item() == pytest.approx(slope)


def test_sft_needs_no_reference():
    logps, _, lengths = numbers()
    loss, sums = loss_of({"sft": 2.0}, logps, None, lengths)
    expected = -2 * sum(logps[a].item() / lengths[a].item() for a in CHOSEN.tolist()) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert list(sums) == ["losses/sft"]
    with pytest.raises(ValueError, match="need a reference, and there is none"):
        loss_of({"sft": 1.0, "ipo": 1.0}, logps, None, lengths)
