"""A tiny trainer, and what tests look at of it."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tests.conftest import disturb, make_policy
from tests.reference import causal_logps
from trl_diffusion import DiffusionSpec, DTRPOConfig, DTRPOTrainer, tiny_policy_path
from trl_diffusion.policies.training import train_padding_token
from trl_diffusion.rewards import sudoku
from trl_diffusion.trainer.batches import trajectories_of, ungroup


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left")


@pytest.fixture(scope="session")
def char_spec(tokenizer) -> DiffusionSpec:
    return DiffusionSpec(mask_token_id=tokenizer.mask_token_id, block_size=8, stop_token_ids=(tokenizer.eos_token_id,))


def codes(completions, **kwargs) -> list[float]:
    """A reward that differs between the answers of a random policy: the mean character code."""
    return [sum(map(ord, text)) / (100 * max(len(text), 1)) for text in completions]


def make_dataset(size: int = 16) -> Dataset:
    rows = sudoku.generate(size, seed=0)
    # Prompts of unequal lengths.
    return Dataset.from_list([{"prompt": sudoku.prompt(r["puzzle"])[: 10 + i % 14], **r} for i, r in enumerate(rows)])


def per_row_inputs(trainer, row_count=8):
    """The local batch that the trainer makes from its first rows."""
    rows = [trainer.train_dataset[i // 4] for i in range(row_count)]
    trainer.model.train()
    return ungroup(trainer._generate_and_score_completions(rows))


def slice_rows(inputs, rows):
    return {k: v[rows] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in inputs.items()}


@pytest.fixture
def make_trainer(tokenizer, char_spec, tmp_path):
    def build(model=None, spec=None, reward_funcs=codes, dataset=None, kwargs=None, seed=0, **options):
        spec = spec or char_spec
        if model is None:
            model = make_policy(spec, seed=seed, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        options = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 14,
            "tokens_per_step": 2,
            "learning_rate": 1e-2,
            "max_steps": 3,
            "logging_steps": 1,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **options,
        }
        return DTRPOTrainer(
            model=model,
            reward_funcs=reward_funcs,
            args=DTRPOConfig(**options),
            train_dataset=make_dataset() if dataset is None else dataset,
            **{"processing_class": tokenizer, **(kwargs or {})},
        )

    return build


def record(trainer):
    """Everything that is drawn: responses, and how each of their tokens is weighed."""
    draws = []
    scoring = trainer.scoring

    @contextmanager
    def spy(inputs, *args):
        with scoring(inputs, *args) as scored:
            weights = scored.layout.weights.clone()
            draws.append((inputs["canvas_ids"].clone(), inputs["draw_seeds"].clone(), weights))
            yield scored

    trainer.scoring = spy
    return draws


# ------------------------------------------------------------------------------------------------------ beside TRL


TEMPERATURE = 0.8  # of `two_trainers`


def blocks_of_one(tokenizer, first_token: str) -> DiffusionSpec:
    return DiffusionSpec(
        mask_token_id=tokenizer.mask_token_id,
        block_size=1,
        token_shift=first_token == "autoregressive",
        first_token=first_token,
        stop_token_ids=(tokenizer.eos_token_id,),
        predicts_mask_token=True,
    )


class PlainTrainer(GRPOTrainer):
    """TRL's trainer with the log-probabilities of a policy that reads token `i` from a mask token behind `i - 1`."""

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **kwargs):
        logps = self.logps_of(model)[:, :logits_to_keep]
        return logps, torch.zeros_like(logps), None


def mask_behind_the_prefix(model, spec, batch):
    """Log-probability of each token, read from a mask token behind those before it, by a causal model."""
    result = []
    for row in range(len(batch)):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row] == 1]
        canvas = batch.canvas_ids[row]
        ids = torch.cat([prompt, canvas]).repeat(len(canvas), 1)
        places = len(prompt) + torch.arange(len(canvas))
        ids[torch.arange(len(canvas)), places] = spec.mask_token_id  # what is behind it is not seen
        logits = model(ids).logits[torch.arange(len(canvas)), places] / TEMPERATURE
        result.append(logits.log_softmax(-1).gather(1, canvas[:, None]).squeeze(1))
    return torch.stack(result)


@pytest.fixture
def two_trainers(make_trainer, tokenizer, tmp_path):
    """Ours and TRL's with the same weights, off policy, and one batch of responses for each."""

    def build(first_token: str, both: dict | None = None, backbone: str = "qwen3", **options):
        spec = blocks_of_one(tokenizer, first_token)
        sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.1}
        seed = 1  # with this some responses end early, and some do not
        model = make_policy(spec, seed=seed, backbone=backbone, **sizes)
        model.save_pretrained(tmp_path / "start")
        common = {
            "beta": 0.05, "temperature": TEMPERATURE, "per_device_train_batch_size": 8, "num_generations": 4,
            "num_iterations": 2, **(both or {}),
        }  # fmt: skip
        ours = make_trainer(str(tmp_path / "start"), spec=spec, **common, **options)
        inputs = per_row_inputs(ours)
        disturb(ours.model)  # so that ratios, clipping and KL all matter
        theirs = (GRPOTrainer if first_token == "autoregressive" else PlainTrainer)(
            model=str(tmp_path / "start"),
            reward_funcs=codes,
            args=GRPOConfig(
                output_dir=str(tmp_path), max_completion_length=14, bf16=False, gradient_checkpointing=False,
                report_to="none", **common,
            ),
            train_dataset=make_dataset(),
            processing_class=tokenizer,
        )  # fmt: skip
        theirs.model.load_state_dict(ours.model.state_dict())
        train_padding_token(theirs.model)  # of which transformers drops the gradient

        width = inputs["completion_ids"].shape[1]
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch")
        plain = {name: inputs[name] for name in names}
        plain["old_per_token_logps"] = inputs["canvas_logps"][:, :width]
        if first_token == "autoregressive":
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            plain["ref_per_token_logps"] = causal_logps(theirs.ref_model, ids, mask, width, TEMPERATURE)
        else:
            batch = trajectories_of(inputs)
            theirs.logps_of = lambda model: mask_behind_the_prefix(model, spec, batch)
            with torch.no_grad():
                plain["ref_per_token_logps"] = theirs.logps_of(theirs.ref_model)[:, :width]
        for trainer in (ours, theirs):
            trainer.model.train()
            trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
        assert inputs["completion_mask"].sum(1).unique().numel() > 1  # responses of unequal lengths
        return ours, inputs, theirs, plain

    return build


def loss_and_gradient(trainer, batch, loss_type: str, level: str, beta: float):
    trainer.loss_type = trainer.args.loss_type = loss_type
    trainer.importance_sampling_level = level
    trainer.beta = beta
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
