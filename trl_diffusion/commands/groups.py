"""
What `--help` of the commands lists, under which heading. A text stands for the option's own, which may be long or about something
else; `None` stands for the first sentence of that.
"""

from __future__ import annotations

from dataclasses import fields

from ..decoding.config import RolloutSettings
from .parser import Groups


INHERITED = "options of TRL and transformers"
_DECODING: dict[str, str | None] = {
    **{one.name: None for one in fields(RolloutSettings)},
    "tempered_confidence": "whether a strategy looks at the distributions that tokens are sampled from",
    "score_selection": "whether log-probabilities include the selection of the tokens",
}
_ROUNDING = {
    "load_in_8bit": "round the weights to 8 bits",
    "load_in_4bit": "round the weights to 4 bits",
}
_POLICY: dict[str, str | None] = {
    "model_name_or_path": "path or hub id of the policy",
    "tokenizer_name_or_path": None,
    "diffusion_spec": "fields of `DiffusionSpec` that complete those of the model, as JSON",
    "dtype": "type of the weights",
}

_ADAPTER = {
    "use_peft": "train a LoRA adapter instead of all weights",
    "lora_r": "rank of the adapter",
    "lora_alpha": "scale of the adapter, before it is divided by the rank",
    "lora_target_modules": "names of the layers that get an adapter",
}
_RANDOM = "instead of a model: fields of a config, as JSON, for a policy with random weights"
_OUTPUT = {
    "output_dir": "where the trained policy, checkpoints and figures go",
    "logging_steps": "updates between two lines of the log",
    "report_to": "trackers, such as wandb, trackio and tensorboard, or none",
    "save_strategy": "when checkpoints are saved: steps, epoch or no",
    "save_steps": "updates between two checkpoints",
    "save_total_limit": "most checkpoints that are kept",
    "resume_from_checkpoint": "true to go on from the newest checkpoint, or the path of one",
}
_REHEARSAL = dict.fromkeys(("dry_run", "gpu_memory"))
_RATE = {
    "learning_rate": "largest learning rate",
    "lr_scheduler_type": "how the learning rate falls, such as linear, cosine or constant_with_warmup",
    "warmup_steps": "updates during which the learning rate rises",
}
_COMPUTING = {
    "bf16": "compute in bfloat16",
    "gradient_checkpointing": "save memory by computing activations twice",
    "seed": "source of randomness",
}
_OWN_ROWS = dict.fromkeys(
    ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "reward_funcs", "system_prompt")
)

TRAIN: Groups = {
    "task and data": {
        "task": None,
        "train_file": "rows to train on, .csv, .jsonl or .json",
        "eval_file": None,
        **_OWN_ROWS,
        "trajectories": None,
        "train_size": None,
        "eval_size": None,
    },
    "policy": {
        **_POLICY,
        "random_policy": _RANDOM,
        **_ROUNDING,
        **_ADAPTER,
    },
    "responses": {
        "num_generations": "responses to each prompt, which are compared with each other",
        "max_completion_length": "most tokens of a response",
        "temperature": "temperature of sampling",
        **_DECODING,
        "rollout_batch_size": None,
    },
    "updates": {
        "max_steps": "number of updates, instead of `num_train_epochs`",
        "num_train_epochs": "times that each prompt is used",
        "per_device_train_batch_size": "responses of a process that are trained on at once",
        "gradient_accumulation_steps": "such batches for each update",
        "num_iterations": "times that each response is trained on",
        **_RATE,
        "loss_type": "loss of TRL (grpo, dr_grpo, dapo, bnpo, cispo, sapo, luspo, vespo), or dpo for pairs of responses",
        "beta": "weight of the distance to the policy before training",
        **_COMPUTING,
    },
    "likelihoods": {
        "estimator": "which states of a response an update scores",
        "num_draws": "denoising steps that are drawn per block, or random masks per response",
        "step_distribution": "how 'dtrpo' draws the scored step of a block",
        "weighting": "whether a drawn step is weighted by the inverse of its probability",
        "num_scored_blocks": None,
        "prompt_mask_probability": None,
        "rescore_old_log_probs": "score fresh responses again for the old log-probabilities",
        "share_prompts": "whether responses to a prompt share its part of the pass",
        "estimator_check_steps": "updates between two comparisons of estimates with the exact log-ratio",
        "estimator_check_size": "most trajectories of such a comparison",
    },
    "stored responses and preferences": {
        "decoding_order": "order in which responses count as denoised of which it is unknown, such as those of a preference dataset",
        "pair_selection": "pairs of a group",
        "dpo_loss_type": "losses of a pair, which are added: sigmoid, robust, hinge, ipo, sft",
        "dpo_loss_weights": None,
        "dpo_length_normalization": "divide the log-ratio of a response by its number of tokens",
        "label_smoothing": None,
        "precompute_ref_log_probs": "let the reference score stored responses once, before training",
    },
    "output": {
        **_OUTPUT,
        "log_completions": "print responses at every line of the log; wandb and trackio get them",
        "log_trajectories": "responses whose denoising is logged as a table",
    },
    "rehearsal": _REHEARSAL,
}

SFT: Groups = {
    "documents": {
        "task": "a task: its right answers are trained, and the share of solved rows is measured",
        "train_file": "documents to train on, .csv, .jsonl or .json: messages, prompt and completion, or text",
        "eval_file": "documents to measure on, or rows of the task",
        "trajectories": "collections whose best responses are trained",
        "train_size": None,
        "eval_size": None,
        "max_length": "most tokens of a document; what is longer loses its end",
        "packing": "put several documents into a row",
        "assistant_only_loss": "of messages, train the assistant's only",
        "completion_only_loss": "of a prompt and its completion, train the completion only",
    },
    "policy": {**_POLICY, "random_policy": _RANDOM, **_ROUNDING, **_ADAPTER},
    "masks": {
        "weighting": None,
        "num_masks": None,
        "complementary": None,
        "max_corruption": None,
        "canvas_length": None,
        "block_sizes": None,
    },
    "updates": {
        "max_steps": "number of updates, instead of `num_train_epochs`",
        "num_train_epochs": "times that each document is used",
        "per_device_train_batch_size": "documents of a process that are trained on at once",
        "gradient_accumulation_steps": "such batches for each update",
        **_RATE,
        **_COMPUTING,
    },
    "responses, when a task is measured": {
        "max_completion_length": "most tokens of a response",
        **_DECODING,
        "per_device_eval_batch_size": "documents, or responses, of a process that are measured at once",
    },
    "output": _OUTPUT,
    "rehearsal": _REHEARSAL,
}

ADAPT: Groups = {
    "model and policy": {
        "model_name_or_path": "path or hub id of the autoregressive model (or as the first argument)",
        "gguf_file": None,
        "tokenizer_name_or_path": None,
        "mask_token": None,
        "block_size": None,
        "token_shift": None,
        "attention": None,
        "block_origin": None,
        "dtype": "type of the weights",
        **_ROUNDING,
        **_ADAPTER,
    },
    "documents": {name: text for name, text in SFT["documents"].items() if name != "trajectories"},
    "masks": SFT["masks"],
    "updates": SFT["updates"],
    "responses, when a task is measured": SFT["responses, when a task is measured"],
    "output": _OUTPUT,
    "rehearsal": _REHEARSAL,
}

COLLECT: Groups = {
    "task and data": {
        "task": None,
        "train_file": "rows to answer, .csv, .jsonl or .json",
        "eval_file": None,
        **_OWN_ROWS,
        "train_size": None,
        "eval_size": None,
    },
    "policy": {**_POLICY, "adapter_name_or_path": None, "chat_template_kwargs": None, **_ROUNDING},
    "responses": {"num_responses": None, "max_completion_length": None, "temperature": None, **_DECODING},
    "responses from elsewhere": {
        "server": "address of an OpenAI-compatible server that answers, such as http://127.0.0.1:8000/v1",
        "served_model": None,
        "api_key_env": None,
        "concurrency": None,
        "responses": "file of responses that are there already: `prompt`, `responses` or `response`, perhaps rewards",
    },
    "output": {"output_dir": None, "batch_size": None, "rows_per_shard": None, "seed": None},
    "rehearsal": _REHEARSAL,
}

EVALUATE: Groups = {
    "what is measured": {
        "tasks": None,
        "data_dir": None,
        **_OWN_ROWS,
        "train_file": None,
        "eval_file": None,
        "limit": None,
        "seeds": None,
        "allow_code_execution": None,
    },
    "policy": {
        "model_name_or_path": None,
        "adapter_name_or_path": None,
        "model_revision": None,
        "tokenizer_name_or_path": None,
        "diffusion_spec": "fields of `DiffusionSpec` that complete those of the model, as JSON",
        "dtype": None,
        "attn_implementation": None,
        **_ROUNDING,
    },
    "responses": {
        "decoding": "settings such as strategy:threshold+threshold:0.9; `trl-diffusion generate --help` lists them",
        "chat_template_kwargs": None,
        "batch_size": None,
    },
    "output": {"output_dir": None},
}
