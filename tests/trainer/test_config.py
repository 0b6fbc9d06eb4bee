"""Options: those without a meaning are refused, and every other one is explained."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import TrainingArguments
from trl import GRPOConfig, ModelConfig, TrlParser

from trl_diffusion import DTRPOConfig
from trl_diffusion.decoding.config import RolloutSettings


@pytest.mark.parametrize(
    "option",
    [
        {"use_vllm": True},
        {"use_transformers_continuous_batching": True},
        {"generation_kwargs": {"num_beams": 2}},
        {"cache_implementation": "static"},
        {"top_p": 0.9},
        {"top_k": 50},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"diffusion_spec": "block"},
        {"loss_type": "dr_grpo", "weighting": "none", "step_distribution": "uniform"},
        {"max_completion_length": None},
        {"loss_type": "dppo"},
        {"temperature": 0.0},
        {"vllm_mode": "server"},
        {"vllm_importance_sampling_correction": False},
        {"max_tool_calling_iterations": 2},
        {"model_init_kwargs": {"trust_remote_code": True}},
        {"model_init_kwargs": {"trust_remote_code": None}},
        {"trust_remote_code": True},
        {"neftune_noise_alpha": 5.0},
        {"max_completion_length": 0},
        {"beta": -0.1},
        {"scale_rewards": "rows"},
        {"importance_sampling_level": "word"},
        {"diffusion_spec": "{block_size"},
    ],
)
def test_options_without_meaning_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        DTRPOConfig(str(tmp_path), bf16=False, **option)


# Every other option of GRPOConfig, and what the tests show of it or why it works as in TRL.
MEANINGFUL = {
    *("model_init_kwargs", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    *("num_generations", "num_generations_eval", "generation_batch_size", "steps_per_generation", "num_iterations"),
    *("max_completion_length", "temperature", "ds3_gather_for_generation", "shuffle_dataset", "pad_to_multiple_of"),
    *("beta", "epsilon", "epsilon_high", "delta", "use_bias_correction_kl", "importance_sampling_level", "loss_type"),
    *("sapo_temperature_neg", "sapo_temperature_pos", "mask_truncated_completions", "chat_template_kwargs"),
    *("reward_weights", "multi_objective_aggregation", "scale_rewards"),
    *("log_completions", "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo"),
    *("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max"),
    *("entropy_coef_delta", "entropy_target", "off_policy_mask_threshold", "cast_lm_head_to_fp32"),
    *("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"),
    "log_multimodal",  # there are no images, so `False` asks for what is so
}


def test_every_option_of_trl_is_refused_or_meaningful(tmp_path):
    """An option that a new TRL brings must be decided about."""
    own = set(GRPOConfig.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__) - MEANINGFUL
    for name in sorted(own):
        config = DTRPOConfig(str(tmp_path), bf16=False)
        assert not config.refused()
        setattr(config, name, "another value")
        assert name in config.refused(), f"GRPOConfig.{name}: refuse it, or say what it does for a diffusion policy."


@pytest.mark.parametrize(
    "option",
    [
        {"num_draws": 0},
        {"num_draws": 1.5},
        {"rollout_batch_size": 0},
        {"step_distribution": "best"},
        {"weighting": "both"},
        {"tokens_per_step": 0},
        {"threshold": 2.0},
        {"strategy": "best"},
    ],
)
def test_bad_options_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        DTRPOConfig(str(tmp_path), bf16=False, **option)


def test_every_option_has_a_help_text_and_a_line_in_the_docstring():
    own = set(DTRPOConfig.__dataclass_fields__) - set(GRPOConfig.__dataclass_fields__)
    settings = set(RolloutSettings.__dataclass_fields__)
    assert len(own - settings) == 20 and settings < own
    for name in own:
        assert DTRPOConfig.__dataclass_fields__[name].metadata["help"]
        texts = RolloutSettings.__doc__ if name in settings else DTRPOConfig.__doc__
        assert f"\n        {name} (" in texts


def test_parser_reads_yaml_and_the_command_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    spec = {"mask_token_id": 7, "block_size": 4}
    path.write_text(f"output_dir: {tmp_path}\nbf16: false\ntokens_per_step: 3\ndiffusion_spec: '{json.dumps(spec)}'\n")
    parser = TrlParser((DTRPOConfig, ModelConfig))
    config, _ = parser.parse_args_and_config(["--config", str(path), "--tokens_per_step", "2"])
    assert config.tokens_per_step == 2 and config.diffusion_spec == spec


def test_memory_is_pinned_only_for_an_accelerator(monkeypatch, tmp_path):
    """torch warns at every run on a CPU otherwise, which is TRL's default and not the user's choice."""
    for there in (False, True):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda there=there: there)
        assert DTRPOConfig(str(tmp_path), bf16=False).dataloader_pin_memory == there


def test_bfloat16_without_a_gpu(tmp_path, monkeypatch):
    """Asked for, it is refused; left open, it is off. A CPU that is asked for computes in it."""
    monkeypatch.setattr("trl_diffusion.trainer.options.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match="`bf16` is set, and this machine has no GPU with bfloat16. .*`--bf16 false`"):
        DTRPOConfig(str(tmp_path), bf16=True)
    assert DTRPOConfig(str(tmp_path)).bf16 is False
    assert DTRPOConfig(str(tmp_path), bf16=True, use_cpu=True).bf16 is True
