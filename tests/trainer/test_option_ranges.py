"""Options out of their range, and options that nothing would look at, are refused by name when the config is made."""

from __future__ import annotations

import math

import pytest

from trl_diffusion import DTRPOConfig


NAN, INF = math.nan, math.inf
OUTSIDE = {
    "learning_rate": [NAN, INF, -1e-6],
    "weight_decay": [NAN, INF, -0.1],
    "adam_beta1": [NAN, -0.1, 1.0],
    "adam_beta2": [NAN, -0.1, 1.0],
    "adam_epsilon": [NAN, INF, -1e-8],
    "max_grad_norm": [NAN, -1.0, None],
    "warmup_steps": [NAN, INF, -1],
    "num_train_epochs": [NAN, INF, 0, -1],
    "max_steps": [0, -2, 2.5, True],
    "temperature": [NAN, INF, 0.0, -1.0],
    "beta": [NAN, INF, -0.1],
    "epsilon": [NAN, INF, -1],
    "epsilon_high": [NAN, INF, -0.1],
    "delta": [NAN, INF, -1.0, 0.5, 1.0],
    "num_iterations": [0, -1, 1.5],
    "num_generations": [0, 1, -4, None],
    "num_generations_eval": [0, -1],
    "per_device_train_batch_size": [0, -8, 8.0],
    "per_device_eval_batch_size": [0, -8],
    "gradient_accumulation_steps": [0, -1],
    "steps_per_generation": [0, -1],
    "generation_batch_size": [0, -8],
    "pad_to_multiple_of": [0, -8],
    "max_completion_length": [0, -1, 16.5],
    "reward_weights": [[NAN], [INF], ["1"], 1.0, [0.0, 0.0]],
    "rollout_batch_size": [0, 1.5],
    "estimator_check_size": [0],
    "save_steps": [0, -1, NAN],
    "logging_steps": [-1, NAN],
    "seed": [-1, 1.5],
    "top_entropy_quantile": [NAN, -0.1, 1.1],
    "entropy_coef": [NAN, INF],
    "off_policy_mask_threshold": [NAN, 0.0, -1.0],
}
WITH = {
    "sapo_temperature_neg": ({"loss_type": "sapo"}, [NAN, 0.0, -1.0]),
    "sapo_temperature_pos": ({"loss_type": "sapo"}, [NAN, 0.0, -1.0]),
    "vespo_k_pos": ({"loss_type": "vespo"}, [NAN, INF, -1.0]),
    "entropy_coef_delta": ({"use_adaptive_entropy": True}, [NAN, -0.1]),
    "epsilon_high": ({"loss_type": "cispo"}, [0.0]),  # the ratio itself is cut off there
    "ref_model_mixup_alpha": ({"sync_ref_model": True, "beta": 0.1}, [NAN, 0.0, 1.5]),
    "ref_model_sync_steps": ({"sync_ref_model": True, "beta": 0.1}, [0, -1, 2.5]),
}
CASES = [(name, value, {}) for name, values in OUTSIDE.items() for value in values]
CASES += [(name, value, options) for name, (options, values) in WITH.items() for value in values]


@pytest.mark.parametrize("name", sorted({*OUTSIDE, *WITH}))
def test_values_outside_their_range(tmp_path, name):
    for value, options in [(value, options) for case, value, options in CASES if case == name]:
        with pytest.raises(ValueError, match=name) as error:
            DTRPOConfig(str(tmp_path / "out"), bf16=False, **{name: value}, **options)
        assert "\n" not in str(error.value), value
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0.0, "warmup_steps": 0.1},
        {"max_grad_norm": INF, "epsilon": 0.0, "epsilon_high": 5.0, "delta": 1.5, "max_steps": 1},
        {"num_train_epochs": 0.01},
        {"max_steps": 4, "num_train_epochs": 0},  # which does not count then
        {"loss_type": "sapo", "sapo_temperature_neg": 2},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"sync_ref_model": True, "beta": 0.1, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1},
        {"reward_weights": [1, -0.5, 0.0], "save_strategy": "no", "save_steps": 0},
    ],
)
def test_values_inside_their_range(tmp_path, options):
    config = DTRPOConfig(str(tmp_path), bf16=False, **options)
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_ref_model": True}, "`sync_ref_model=True` needs a reference: set `beta`"),
        ({"precompute_ref_log_probs": True}, "`precompute_ref_log_probs=True` needs a reference: set `beta`"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True, "beta": 0.1}, "Set one of them to False"),
        ({"pair_selection": "all"}, "`pair_selection` is for `loss_type` 'dpo', not for 'dapo'"),
        ({"dpo_length_normalization": True}, "`dpo_length_normalization` is for `loss_type` 'dpo'"),
        ({"delta": 2.0, "loss_type": "cispo"}, "`delta` is for `loss_type` 'grpo' or 'dr_grpo'"),
        ({"sapo_temperature_pos": 2.0}, "`sapo_temperature_pos` is for `loss_type` 'sapo'"),
        ({"epsilon": 0.1, "loss_type": "dpo", "beta": 0.1}, "`epsilon` is for"),
        ({"entropy_coef": 0.1, "loss_type": "dpo", "beta": 0.1}, "`entropy_coef` is for `loss_type`"),
        ({"vespo_k_pos": 1.0}, "`vespo_k_pos` is for `loss_type` 'vespo'"),
        ({"entropy_target": 0.5}, "`entropy_target` is for `use_adaptive_entropy=True`"),
        ({"data_seed": 3}, "`data_seed`: the order of the prompts is drawn from `seed`"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor`: there are no labels"),
        ({"enable_jit_checkpoint": True}, "`enable_jit_checkpoint`: it saves in the middle of an update"),
        ({"train_sampling_strategy": "sequential"}, "`train_sampling_strategy`: TRL's own sampler"),
        ({"diffusion_spec": '{"block_size": 4, "block_size": 8}'}, "The key 'block_size' is given twice"),
    ],
)
def test_options_that_nothing_would_look_at(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DTRPOConfig(str(tmp_path), bf16=False, **options)


def test_the_order_of_pairs_without_pairs(make_trainer):
    with pytest.raises(ValueError, match="`decoding_order='left_to_right'` is for datasets of preference pairs"):
        make_trainer(decoding_order="left_to_right")
