"""
O8 of docs/method.md for every option: in blocks of one token, autoregression is what remains, whatever the estimator and its
draws, and the loss is that of TRL's own `GRPOTrainer` on the same causal model and batch.
"""

from __future__ import annotations

import pytest
import torch

from tests.closeness import assert_close, assert_close_gradients, close_to
from tests.trainer.conftest import loss_and_gradient, slice_rows
from trl_diffusion.seeds import derive_seed


LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
OPTIONS = {
    "uniform": {},
    "uniform-2": {"num_draws": 2},
    "token": {"step_distribution": "token"},
    "token-2": {"step_distribution": "token", "num_draws": 2},
    "none": {"weighting": "none", "step_distribution": "uniform"},
    "all-blocks": {"num_scored_blocks": 14},  # as many as there are
    "exact": {"estimator": "exact"},
}
# Nothing is masked that a causal model would see, so these are the trajectory, too.
BASELINES = {
    "elbo-2": {"estimator": "elbo", "num_draws": 2},
    "mean-field": {"estimator": "mean_field", "prompt_mask_probability": 0.0},
    "coupled": {"estimator": "coupled"},
}
# With these, one loss each: how a token is estimated and which loss sums it do not depend on each other, but for
# `weighting="none"`, which some losses divide by (and dr_grpo, luspo and vespo refuse).
SOME = {
    "uniform-2": ["grpo"],
    "token": ["vespo"],
    "token-2": ["sapo"],
    "none": ["grpo", "bnpo", "cispo"],
    "all-blocks": ["cispo"],
    "exact": ["dapo"],
    "elbo-2": ["luspo"],
    "mean-field": ["grpo"],
    "coupled": ["dr_grpo"],
}


def assert_equal_losses(ours, inputs, theirs, plain, losses):
    seen = set()
    for loss_type in losses:
        for level, beta in (("token", 0.0), ("token", 0.05), ("sequence", 0.05)):
            found, wanted = (
                loss_and_gradient(trainer, batch, loss_type, level, beta)
                for trainer, batch in ((ours, inputs), (theirs, plain))
            )
            assert wanted[1].abs().max() > 1e-4
            assert_close(found[0], wanted[0])
            assert_close_gradients(found[1], wanted[1])
            seen.add(round(wanted[0].item(), 6))
    assert len(seen) > 2 * len(losses)  # they are different losses indeed


@pytest.mark.parametrize(
    ("name", "backbone"), [*((name, "qwen3") for name in (*OPTIONS, *BASELINES)), ("uniform", "qwen2")]
)
def test_o8_blocks_of_one_give_trl_own_loss(two_trainers, name, backbone):
    """Autoregressive first tokens: every token is one, and is in every pass."""
    options = {**OPTIONS, **BASELINES}[name]
    ours, inputs, theirs, plain = two_trainers("autoregressive", backbone=backbone, **options)
    if name in BASELINES:  # the old policy was asked; it must say what was recorded
        mask = inputs["completion_mask"].bool()
        old = inputs["old_estimates"][:, 0, : mask.shape[1]]
        assert_close(old[mask], plain["old_per_token_logps"][mask])
    assert_equal_losses(ours, inputs, theirs, plain, SOME.get(name, LOSSES if backbone == "qwen3" else ["dapo"]))


@pytest.mark.parametrize("name", ["uniform-2", "token-2", "none", "exact"])
def test_o8_denoised_blocks_of_one_give_trl_own_loss(two_trainers, name):
    """Denoised tokens: a block has one step, which any draw draws, with weight 1."""
    ours, inputs, theirs, plain = two_trainers("diffusion", **OPTIONS[name])
    with ours.scoring(inputs) as scored:
        layout = scored.layout
        weights = layout.weights[:, : inputs["completion_mask"].shape[1]]
        torch.testing.assert_close(weights, inputs["completion_mask"].float())
    assert_equal_losses(ours, inputs, theirs, plain, ["dapo"])


@pytest.mark.parametrize("first_token", ["autoregressive", "diffusion"])
def test_o8_one_token_of_a_response_gives_trl_own_loss_on_average(two_trainers, first_token):
    """One block of `S` scored: the mean over the `S` choices, for losses that are linear in the weights."""
    ours, inputs, theirs, plain = two_trainers(first_token, num_scored_blocks=1)
    lengths = inputs["completion_mask"].sum(1).tolist()
    row = lengths.index(min(length for length in lengths if length > 2))
    one, other = (slice_rows(batch, slice(row, row + 1)) for batch in (inputs, plain))
    if first_token == "diffusion":
        logps_of = theirs.logps_of
        theirs.logps_of = lambda model: logps_of(model)[row : row + 1]

    seeds = {}  # one for each token that can be drawn
    for seed in range(60 * lengths[row]):
        with ours.scoring({**one, "draw_seeds": torch.tensor([derive_seed(seed)])}) as scored:
            layout = scored.layout
            (place,) = layout.weights[0].nonzero().flatten().tolist()
            assert layout.weights[0, place] == lengths[row]
            seeds.setdefault(place, derive_seed(seed))
        if len(seeds) == lengths[row]:
            break
    assert sorted(seeds) == list(range(lengths[row]))
    for loss_type in ("dr_grpo", "dapo", "cispo", "luspo"):
        found = [
            loss_and_gradient(ours, {**one, "draw_seeds": torch.tensor([seed])}, loss_type, "token", 0.05)
            for seed in seeds.values()
        ]
        wanted = loss_and_gradient(theirs, other, loss_type, "token", 0.05)
        assert torch.stack([loss for loss, _ in found]).std() > 1e-3
        mean_loss, mean_gradient = (torch.stack(results).mean(0) for results in zip(*found, strict=True))
        assert_close(mean_loss, wanted[0])
        assert_close_gradients(mean_gradient, wanted[1])


# ------------------------------------------------------------------------------------------------- options of the loss


LOSS_OPTIONS = {
    "vespo": {"loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_neg": 1.0},
    "quantile": {"loss_type": "grpo", "top_entropy_quantile": 0.3},
    "quantile-dapo": {"loss_type": "dapo", "top_entropy_quantile": 0.3},
    "quantile-0": {"loss_type": "bnpo", "top_entropy_quantile": 0.0},
    "off-policy": {"loss_type": "dapo", "off_policy_mask_threshold": 0.01},
    "entropy": {"loss_type": "grpo", "entropy_coef": 0.3},
    "entropy-luspo": {"loss_type": "luspo", "entropy_coef": -0.3},
    "entropy-quantile": {"loss_type": "dapo", "entropy_coef": 0.3, "top_entropy_quantile": 0.4},
    "adaptive": {"loss_type": "grpo", "entropy_coef": 0.3, "use_adaptive_entropy": True, "entropy_target": 9.0},
    "adaptive-quiet": {"loss_type": "grpo", "entropy_coef": 0.3, "use_adaptive_entropy": True, "entropy_target": 1.0},
}


@pytest.mark.parametrize("name", LOSS_OPTIONS)
def test_o8_options_of_the_loss_are_trls_own(two_trainers, name):
    """Options that look at entropies, at how far the policy has moved, or at whole sequences."""
    both = LOSS_OPTIONS[name]
    ours, inputs, theirs, plain = two_trainers("autoregressive", both=both)
    results = {}
    for kind, trainer, batch in (("ours", ours, inputs), ("theirs", theirs, plain)):
        for call in range(2):  # the adaptive coefficient goes by the call before
            results[kind, call] = loss_and_gradient(trainer, batch, both["loss_type"], "token", 0.05)
    for call in range(2):
        (loss, gradient), (wanted_loss, wanted_gradient) = results["ours", call], results["theirs", call]
        assert_close(loss, wanted_loss)
        assert_close_gradients(gradient, wanted_gradient)
    assert ours.entropy_coef == pytest.approx(theirs.entropy_coef, rel=1e-6)
    for metric in ("policy_loss", "entropy", "vespo/phi_seq_mean"):
        found, wanted = (trainer._metrics["train"][metric] for trainer in (ours, theirs))
        assert found == close_to(wanted), metric
    # Without the option TRL's gradient is another one, so the equality says something.
    theirs.top_entropy_quantile, theirs.off_policy_mask_threshold, theirs._entropy_bonus_enabled = 1.0, None, False
    loss_type = "dapo" if name == "vespo" else both["loss_type"]
    change = (loss_and_gradient(theirs, plain, loss_type, "token", 0.05)[1] - wanted_gradient).abs().max()
    assert (change > 1e-3) == (name != "adaptive-quiet")
