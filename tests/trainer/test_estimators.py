"""Every estimator under the trainer: it trains, its old policy saw the same masks, and prompts are shared exactly."""

from __future__ import annotations

import pytest
import torch

from tests.closeness import ROUNDING, assert_close, assert_close_gradients, close_to
from tests.conftest import disturb, make_policy
from tests.trainer.conftest import per_row_inputs, slice_rows
from trl_diffusion import DTRPOConfig
from trl_diffusion.policies.attention import PLANNED
from trl_diffusion.scoring.estimators import ESTIMATORS


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


ATTENTIONS = {
    "block": {},
    "clean-causal": {"clean_attention": "causal", "first_token": "autoregressive", "block_origin": "response"},
    "full": {"attention": "full", "block_origin": "response"},
}


@pytest.fixture(params=ATTENTIONS)
def attention(request, char_spec):
    return char_spec.replace(**ATTENTIONS[request.param])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_trains(make_trainer, tmp_path, tokenizer, attention, estimator):
    policy = make_policy(attention, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    policy.save_pretrained(tmp_path / "start")
    trainer = make_trainer(
        str(tmp_path / "start"), spec=attention, estimator=estimator, beta=0.05, num_iterations=2, max_steps=2
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert not any(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    logs = logs_of(trainer)
    # First pass over a rollout: the policy is the old policy. Second pass: it has moved.
    first, second = logs
    assert first["diffusion/log_ratio_std"] < ROUNDING < second["diffusion/log_ratio_std"]
    assert first["diffusion/effective_sample_size"] > 1 - 1e-5 > second["diffusion/effective_sample_size"]
    assert first["diffusion/kl_to_old"] < 1e-6 < second["diffusion/kl_to_old"]
    assert logs[0]["kl"] < 1e-6 < logs[1]["kl"]
    assert all(entry["diffusion/scored_tokens"] > 0 for entry in logs)
    assert ("diffusion/recorded_gap/max" in logs[0]) == ESTIMATORS[estimator].recorded


@pytest.mark.parametrize("estimator", ["elbo", "mean_field", "coupled"])
def test_the_old_policy_sees_the_same_masks(make_trainer, estimator):
    """With several updates and passes from one rollout and a policy that does not move, every ratio is 1."""
    trainer = make_trainer(
        estimator=estimator,
        learning_rate=0.0,
        num_iterations=2,
        steps_per_generation=2,
        gradient_accumulation_steps=1,
        max_steps=4,
    )
    masks = []
    compute = trainer._get_per_token_logps_and_entropies

    def spy(*args, **kwargs):
        if trainer.scored is not None:
            masks.append(trainer.scored.layout.input_ids.clone())
        return compute(*args, **kwargs)

    trainer._get_per_token_logps_and_entropies = spy
    trainer.train()
    assert all(entry["diffusion/log_ratio_std"] < ROUNDING for entry in logs_of(trainer))
    # Passes over the same responses draw afresh (batches 0 and 1 of the first pass are 2 and 3 of the second).
    assert masks[0].shape != masks[2].shape or not torch.equal(masks[0], masks[2])


def test_aligned_updates_need_no_old_estimates(make_trainer):
    trainer = make_trainer(estimator="elbo")
    assert "old_estimates" not in per_row_inputs(trainer, 4)
    trainer = make_trainer(estimator="elbo", num_iterations=3, num_draws=2)
    inputs = per_row_inputs(trainer, 4)
    assert inputs["old_estimates"].shape == (4, 3, inputs["canvas_ids"].shape[1])
    assert not torch.equal(inputs["old_estimates"][:, 0], inputs["old_estimates"][:, 1])


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_group_loss_is_the_weighted_one(make_trainer, estimator, loss_type, level):
    """TRL's loss with weights as its mask, written out; off policy, so that ratios and clipping matter."""
    trainer = make_trainer(
        estimator=estimator, loss_type=loss_type, importance_sampling_level=level, num_iterations=2, beta=0.0
    )
    inputs = per_row_inputs(trainer, 4)
    trainer.current_gradient_accumulation_steps = 1
    disturb(trainer.model)
    with torch.no_grad():
        loss = trainer._compute_loss(trainer.model, inputs)
        with trainer.scoring(inputs) as scored:
            layout = scored.layout
            new = trainer._get_per_token_logps_and_entropies(trainer.model, None, None, layout.weights.shape[1])[0]
            old, weights = scored.old, layout.weights
    advantages = inputs["advantages"][:, None]
    log_ratio = new - old
    if level == "sequence":
        log_ratio = ((log_ratio * weights).sum(1) / weights.sum(1).clamp(min=1))[:, None].expand_as(weights)
    ratio = log_ratio.exp()
    if loss_type == "cispo":
        losses = -ratio.clamp(max=trainer.epsilon_high) * advantages * new
    elif loss_type == "sapo":
        slope = torch.where(advantages > 0, trainer.args.sapo_temperature_pos, trainer.args.sapo_temperature_neg)
        losses = -torch.sigmoid(slope * (ratio - 1)) * 4 / slope * advantages
    else:
        clipped = ratio.clamp(1 - trainer.epsilon_low, 1 + trainer.epsilon_high)
        losses = -torch.min(ratio * advantages, clipped * advantages)
    sums = (losses * weights).sum(1)
    expected = {
        "grpo": lambda: (sums / weights.sum(1).clamp(min=1)).mean(),
        "sapo": lambda: (sums / weights.sum(1).clamp(min=1)).mean(),
        "bnpo": lambda: sums.sum() / weights.sum(),
        "dr_grpo": lambda: sums.sum() / (4 * trainer.max_completion_length),
        "dapo": lambda: sums.sum() / inputs["num_items_in_batch"],
        "cispo": lambda: sums.sum() / inputs["num_items_in_batch"],
        "luspo": lambda: sums.mean(),
    }[loss_type]()
    assert loss.item() == close_to(expected.item())


def test_shared_prompts_give_the_same_loss_and_gradient(make_trainer):
    results = []
    for share in (True, False):
        trainer = make_trainer(per_device_train_batch_size=8, share_prompts=share, beta=0.0)
        inputs = per_row_inputs(trainer)
        trainer.current_gradient_accumulation_steps = 1
        with trainer.scoring(inputs) as scored:
            layout = scored.layout
            assert (layout.allowed.count > 1) == share
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])))
    assert_close(results[0][0], results[1][0])
    assert_close_gradients(results[0][1], results[1][1])


@pytest.mark.parametrize("checkpointing", [False, {"use_reentrant": True}, {"use_reentrant": False}])
def test_shared_prompts_under_gradient_checkpointing(make_trainer, checkpointing):
    """The segments reach the layers again when they are recomputed."""
    gradients = []
    for enabled in (False, checkpointing):
        options = {"gradient_checkpointing": bool(enabled)}
        if enabled:
            options["gradient_checkpointing_kwargs"] = enabled
        trainer = make_trainer(per_device_train_batch_size=8, **options)
        inputs = per_row_inputs(trainer)
        trainer.current_gradient_accumulation_steps = 1
        trainer._compute_loss(trainer.model, inputs).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    assert_close_gradients(*gradients)


def test_groups_stay_together(make_trainer, tmp_path):
    """Shuffling and splitting move groups, so that every batch can share prompts; the saved config says nothing of it."""
    trainer = make_trainer(per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=2)
    layouts = []
    compute = trainer._get_per_token_logps_and_entropies

    def spy(*args, **kwargs):
        if trainer.scored is not None:
            layouts.append(trainer.scored.layout)
        return compute(*args, **kwargs)

    trainer._get_per_token_logps_and_entropies = spy
    trainer.train()
    assert len(layouts) == 4
    assert all(layout.allowed.count == 4 for layout in layouts)
    trainer.save_model(tmp_path / "saved")
    assert PLANNED not in (tmp_path / "saved" / "config.json").read_text()


def test_batches_that_cut_groups_are_shuffled_by_response(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1)
    trainer.model.train()
    output = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    assert output["prompt_ids"].dim() == 2
    trainer.train()


def test_grouped_training_equals_ungrouped(make_trainer):
    """One batch per update: the order of responses does not matter, so the weights must not either."""
    weights = []
    for share in (True, False):
        # Not with Adam, which makes whole steps of what rounding leaves of a gradient of 0.
        trainer = make_trainer(per_device_train_batch_size=8, share_prompts=share, optim="sgd", max_steps=2)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert_close(*weights)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_estimator_check(make_trainer, tmp_path, tokenizer, char_spec, beta):
    policy = make_policy(char_spec, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    policy.save_pretrained(tmp_path / "start")
    trainer = make_trainer(str(tmp_path / "start"), beta=beta, num_iterations=2, estimator_check_steps=3, max_steps=4)
    trainer.train()
    logs = logs_of(trainer)
    assert [("diffusion/check/bias" in entry) for entry in logs] == [True, False, False, True]
    assert abs(logs[0]["diffusion/check/log_ratio"]) < 1e-4  # nothing has moved yet
    late = logs[3]
    assert late["diffusion/check/std"] > 0 and abs(late["diffusion/check/log_ratio"]) > 1e-4
    assert -1 <= late["diffusion/check/correlation"] <= 1
    plain = make_trainer(str(tmp_path / "start"), beta=beta, num_iterations=2, max_steps=4)
    plain.train()
    assert [e["loss"] for e in logs_of(plain)] == [e["loss"] for e in logs]  # looking changes nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "vrpo"}, "estimator"),
        ({"estimator_check_steps": 0}, "estimator_check_steps"),
        ({"estimator_check_steps": 5, "estimator": "elbo"}, "beta"),
        ({"estimator": "elbo", "weighting": "none"}, "weighting"),
        ({"num_scored_blocks": 0}, "num_blocks"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DTRPOConfig(output_dir=str(tmp_path), max_completion_length=8, bf16=False, **options)


def test_blocks_of_full_attention_are_refused_before_training(make_trainer, char_spec):
    with pytest.raises(ValueError, match="`num_scored_blocks` of the trainer.* is for block attention"):
        make_trainer(spec=char_spec.replace(attention="full"), num_scored_blocks=1)


def test_subsampled_blocks_train(make_trainer):
    trainer = make_trainer(num_scored_blocks=1, max_completion_length=24)
    trainer.train()
    whole = make_trainer(max_completion_length=24)
    whole.train()
    scored = [logs_of(t)[0]["diffusion/scored_tokens"] for t in (trainer, whole)]
    assert 0 < scored[0] < scored[1]


def test_accumulated_batches_of_groups_sum_to_the_whole(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=8, loss_type="dapo")
    inputs = per_row_inputs(trainer)
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    whole = trainer._compute_loss(trainer.model, inputs).item()
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 2
    halves = [trainer._compute_loss(trainer.model, slice_rows(inputs, slice(i, i + 4))).item() for i in (0, 4)]
    assert sum(halves) == close_to(whole)
