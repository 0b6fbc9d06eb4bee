"""
Options of TRL's loss that look at entropies, at how far the policy has moved, or at whole sequences: with drawn steps, every token
counts as many times as its weight says. `test_autoregression.py` has them in blocks of one token.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch.distributions import Categorical
from trl import GRPOTrainer

from tests.closeness import assert_close, assert_close_gradients, close_to
from tests.conftest import make_policy
from tests.trainer.conftest import loss_and_gradient, per_row_inputs, slice_rows
from trl_diffusion import DTRPOConfig, DTRPOTrainer
from trl_diffusion.policies.forward import policy_logits
from trl_diffusion.scoring.score import high_entropy, score


# ------------------------------------------------------------------------------------------------------------ entropies


@pytest.fixture
def moved(make_trainer):
    """A trainer of blocks of 8 that are unmasked in 1 to 8 steps, whose policy has moved since its rollout."""

    def build(**options):
        options = {
            "per_device_train_batch_size": 8,
            "strategy": "threshold",
            "threshold": 0.1,
        } | options
        trainer = make_trainer(**options)
        inputs = per_row_inputs(trainer)
        with torch.no_grad():
            for index, parameter in enumerate(trainer.model.parameters()):
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
        with trainer.scoring(inputs) as scored:
            layout = scored.layout
            weights = layout.weights
            assert weights[weights > 0].unique().numel() > 1  # tokens stand for different numbers of tokens
        return trainer, inputs, layout

    return build


def test_gradient_of_entropies(policy, spec, moved):
    """Against `torch.distributions`, from the same logits."""
    trainer, _, layout = moved()
    model, spec, temperature = trainer.model, trainer.spec, 0.7
    _, entropies = score(model, layout, spec, temperature, compute_entropy=True, entropy_gradient=True)
    (entropies * layout.weights).sum().backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    logits = policy_logits(model, layout.input_ids, layout.position_ids, layout.allowed, layout.rows, layout.columns)
    kept = [token for token in range(logits.shape[1]) if token != spec.mask_token_id]
    wanted = Categorical(logits=logits[:, kept].double() / temperature).entropy()
    places = (layout.responses, layout.event_columns)
    assert_close(entropies[places].double(), wanted)
    (wanted * layout.weights[places]).sum().backward()
    assert_close_gradients(found, torch.cat([p.grad.flatten() for p in model.parameters()]))


def test_entropies_have_no_gradient_unless_it_is_asked_for(moved):
    trainer, _, layout = moved()
    assert not score(trainer.model, layout, trainer.spec, compute_entropy=True)[1].requires_grad
    with torch.no_grad():
        found = score(trainer.model, layout, trainer.spec, compute_entropy=True, entropy_gradient=True)
    assert not found[1].requires_grad


def test_bonus_is_the_weighted_mean_of_entropies(moved):
    trainer, inputs, _ = moved()
    plain = trainer._compute_loss(trainer.model, dict(inputs))
    bonus, inputs, layout = moved(entropy_coef=0.25)
    loss = bonus._compute_loss(bonus.model, dict(inputs))
    entropies = score(bonus.model, layout, bonus.spec, compute_entropy=True)[1]
    mean = (entropies * layout.weights).sum() / layout.weights.sum()
    assert (plain - loss).item() == pytest.approx(0.25 * mean.item(), rel=1e-4)
    assert bonus._metrics["train"]["entropy"][-1] == pytest.approx(mean.item(), rel=1e-4)


# --------------------------------------------------------------------------------------------------- most uncertain tokens


class Alone:
    accelerator = Accelerator(cpu=True)


def masks(entropies, weights, quantile):
    """Ours, and TRL's own for weights of 1."""
    return tuple(
        trainer.get_high_entropy_mask(Alone(), entropies, weights, quantile) for trainer in (DTRPOTrainer, GRPOTrainer)
    )


@pytest.mark.parametrize("quantile", [0.0, 0.2, 0.5, 0.7, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_equal_weights_give_trl_own_mask(quantile, ties):
    entropies = torch.rand(4, 9, generator=torch.Generator().manual_seed(0))
    if ties:
        entropies = (4 * entropies).round() / 4
    mask = (torch.arange(9) < torch.tensor([[9], [5], [1], [7]])).float()
    ours, theirs = masks(entropies, mask, quantile)
    assert torch.equal(ours, theirs) and ours.any()
    assert torch.equal(masks(entropies, 5.0 * mask, quantile)[0], theirs)  # all count the same


def test_no_token_is_scored():
    assert not masks(torch.rand(2, 3), torch.zeros(2, 3), 0.5)[0].any()


def test_a_drawn_token_stands_for_as_many_as_its_weight_says():
    """What is drawn with probability 1 / 8 and weight 8 gives the mask that all tokens would give; TRL's would not."""
    generator = torch.Generator().manual_seed(0)
    entropies = torch.cat([torch.rand(16000, generator=generator), 1 + torch.rand(2000, generator=generator)])
    weights = torch.cat([torch.full((16000,), 8.0), torch.ones(2000)])
    drawn = torch.rand(18000, generator=generator) < 1 / weights
    whole = torch.quantile(entropies, 0.8)
    assert whole < 0.95  # among the tokens that are drawn rarely
    entropies, weights = entropies[None, drawn], weights[None, drawn]
    ours, theirs = masks(entropies, weights, 0.8)
    assert abs(entropies[ours].min() - whole) < 0.02
    assert abs((weights * ours).sum() / weights.sum() - 0.2) < 0.02
    assert (weights * theirs).sum() / weights.sum() > 0.5


def test_the_pool_may_be_larger_than_the_rows():
    """As on one of several processes."""
    entropies, weights = torch.tensor([[1.0, 4.0, 9.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    pool = (torch.tensor([1.0, 4.0, 0.5, 5.0, 6.0]), torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0]))
    assert high_entropy(entropies, weights, pool, 0.5).tolist() == [[False, True, False]]
    assert high_entropy(entropies, weights, pool, 0.7).tolist() == [[False, False, False]]
    assert high_entropy(entropies, weights, pool, 0.0).tolist() == [[True, True, False]]


def test_the_loss_is_that_of_the_most_uncertain_tokens(moved):
    """Unscored tokens, whose entropies are 0, take no part."""
    trainer, inputs, layout = moved(top_entropy_quantile=0.25, loss_type="dapo")
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    logps, entropies = score(trainer.model, layout, trainer.spec, compute_entropy=True)
    scored = layout.weights > 0
    pairs = sorted(zip(entropies[scored].tolist(), layout.weights[scored].tolist(), strict=True), reverse=True)
    kept, total = 0.0, sum(weight for _, weight in pairs)
    for threshold, weight in pairs:
        if kept > 0.25 * (total - weight):
            break
        kept, lowest = kept + weight, threshold
    chosen = scored & (entropies >= lowest)
    ratio = (logps - inputs["canvas_logps"]).exp()
    advantages = inputs["advantages"][:, None]
    terms = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    wanted = (terms * layout.weights * chosen).sum() / inputs["num_items_in_batch"]
    assert loss.item() == close_to(wanted.item())


# ----------------------------------------------------------------------------------------- off-policy mask, whole sequences


def test_off_policy_mask_goes_by_the_weighted_mean(moved):
    trainer, inputs, layout = moved(loss_type="bnpo")
    with torch.no_grad():
        logps, _ = score(trainer.model, layout, trainer.spec)
    kl = ((inputs["canvas_logps"] - logps) * layout.weights).sum(1) / layout.weights.sum(1)
    threshold = kl[inputs["advantages"] < 0].sort().values[:2].mean().item()
    masked, inputs, layout = moved(loss_type="bnpo", off_policy_mask_threshold=max(threshold, 1e-4))
    for row in range(8):
        one = slice_rows(inputs, slice(row, row + 1))
        loss, gradient = loss_and_gradient(masked, one, "bnpo", "token", 0.0)
        dropped = inputs["advantages"][row] < 0 and kl[row] > masked.args.off_policy_mask_threshold
        assert (gradient.abs().max() == 0) == bool(dropped)
    assert 0 < ((inputs["advantages"] < 0) & (kl > masked.args.off_policy_mask_threshold)).sum() < 8


@pytest.mark.parametrize("estimator", ["elbo", "mean_field", "coupled"])
def test_nothing_is_off_policy_before_the_first_update(make_trainer, estimator):
    """These estimators score other states than those in which a log-probability was recorded."""
    results = []
    for threshold in (None, 1e-3):
        trainer = make_trainer(
            estimator=estimator, per_device_train_batch_size=8, loss_type="dapo", off_policy_mask_threshold=threshold
        )
        inputs = per_row_inputs(trainer)
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
        results.append(loss_and_gradient(trainer, inputs, "dapo", "token", 0.0))
    assert results[0][1].abs().max() > 1e-4
    assert_close(results[1][0], results[0][0])
    assert_close_gradients(results[1][1], results[0][1])


def test_vespo_takes_the_estimated_ratio_of_the_whole_response(moved):
    """`phi(w) = e^lambda w^k e^(-lambda w)` with `log w` the estimate of docs/method.md, section 2."""
    trainer, inputs, layout = moved(loss_type="vespo")
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    logps, _ = score(trainer.model, layout, trainer.spec)
    log_w = ((logps - inputs["canvas_logps"]) * layout.weights).sum(1).clamp(max=20)
    good = inputs["advantages"] >= 0
    k, scale = torch.where(good, 2.0, 3.0), torch.where(good, 3.0, 2.0)
    phi = (scale + k * log_w - scale * log_w.exp()).exp()
    terms = -(phi * inputs["advantages"])[:, None] * logps * layout.weights
    wanted = terms.sum() / inputs["num_items_in_batch"]
    assert loss.item() == close_to(wanted.item())


# --------------------------------------------------------------------------------------------------------------- others


@pytest.mark.parametrize("tied", [False, True])
def test_head_in_float32(make_trainer, char_spec, tokenizer, tied):
    """With a bfloat16 policy, logits of rollouts and updates are products of float32."""
    model = make_policy(
        char_spec, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=tied
    )
    trainer = make_trainer(model.bfloat16(), cast_lm_head_to_fp32=True, max_steps=1)
    found = []
    trainer.model.lm_head.register_forward_hook(
        lambda head, args, output: found.append((args[0].dtype, output.dtype, torch.is_grad_enabled()))
    )
    trainer.train()
    assert trainer.model.lm_head.weight.dtype == torch.float32
    assert {(torch.bfloat16, torch.float32, False), (torch.bfloat16, torch.float32, True)} == set(found)
    assert "loss" in trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_entropy_quantile": 1.5}, "top_entropy_quantile"),
        ({"top_entropy_quantile": float("nan")}, "top_entropy_quantile"),
        ({"off_policy_mask_threshold": 0.0}, "off_policy_mask_threshold"),
        ({"loss_type": "vespo", "weighting": "none", "step_distribution": "uniform"}, "vespo.*weighting"),
        *(
            ({"loss_type": "dpo", "beta": 0.1, "per_device_train_batch_size": 8, **option}, next(iter(option)))
            for option in (
                {"top_entropy_quantile": 0.2},
                {"entropy_coef": 0.1},
                {"use_adaptive_entropy": True},
                {"off_policy_mask_threshold": 0.5},
            )
        ),
    ],
)
def test_settings_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DTRPOConfig(output_dir=str(tmp_path), max_completion_length=8, bf16=False, **options)


def test_token_ids_alone_have_no_log_probability(make_trainer):
    trainer = make_trainer()
    ids = torch.arange(6)[None]
    with pytest.raises(RuntimeError, match="depends on the order"):
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 4)


def test_the_adaptive_coefficient_is_resumed(make_trainer, tmp_path):
    """A run that goes on from a checkpoint has the same coefficient, losses and weights as the uninterrupted one."""
    options = {
        "entropy_coef": 0.1, "use_adaptive_entropy": True, "entropy_target": 9.0, "save_strategy": "steps",
        "save_steps": 2, "max_steps": 4, "output_dir": str(tmp_path),
    }  # fmt: skip
    whole = make_trainer(**options)
    whole.train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.entropy_coef == whole.entropy_coef == pytest.approx(0.12)
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (whole, resumed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
