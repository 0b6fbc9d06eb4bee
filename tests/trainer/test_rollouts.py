"""Rollouts: what they depend on, and what they leave as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset

from tests.closeness import assert_close
from tests.trainer.conftest import make_dataset, per_row_inputs
from trl_diffusion import DTRPOTrainer


def test_evaluation_does_not_move_the_random_streams(make_trainer):
    plain, evaluated = (
        make_trainer(),
        make_trainer(kwargs={"eval_dataset": make_dataset(4)}, per_device_eval_batch_size=4),
    )
    evaluated.evaluate()
    first, second = per_row_inputs(plain), per_row_inputs(evaluated)
    assert torch.equal(first["draw_seeds"], second["draw_seeds"])
    assert torch.equal(first["canvas_ids"], second["canvas_ids"])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_rollouts_leave_gradient_checkpointing_as_it_was(make_trainer, monkeypatch, use_reentrant, fails):
    """Off while decoding; afterwards on again, and of the same kind, whether decoding went well or not."""
    options = {"use_reentrant": use_reentrant}
    trainer = make_trainer(gradient_checkpointing=True, gradient_checkpointing_kwargs=options, max_steps=1)
    trainer.train()
    layer = trainer.model.model.layers[0]
    seen = []

    def watch(*args):
        seen.append(layer.gradient_checkpointing)
        if fails:
            raise MemoryError("while decoding")

    handle = trainer.model.get_output_embeddings().register_forward_hook(watch)
    if fails:
        with pytest.raises(MemoryError, match="while decoding"):
            trainer.answer(trainer.train_dataset["prompt"][:1])
    else:
        trainer.answer(trainer.train_dataset["prompt"][:1])
    handle.remove()
    assert seen and not any(seen)
    assert layer.gradient_checkpointing and layer._gradient_checkpointing_func.keywords == options
    assert trainer.model.training


def test_rollouts_depend_on_the_seed_and_the_step_alone(make_trainer):
    first, again, other = (make_trainer(seed=0) for _ in range(3))
    other.args.seed = 3
    for trainer in (first, again, other):
        torch.rand(trainer.args.seed + 1)  # the global random state plays no part
    batches = [per_row_inputs(trainer) for trainer in (first, again, other)]
    assert torch.equal(batches[0]["canvas_ids"], batches[1]["canvas_ids"])
    assert torch.equal(batches[0]["draw_seeds"], batches[1]["draw_seeds"])
    assert not torch.equal(batches[0]["draw_seeds"], batches[2]["draw_seeds"])
    # A second rollout in the same optimizer step is another one.
    assert not torch.equal(per_row_inputs(first)["draw_seeds"], batches[0]["draw_seeds"])


def test_rollout_batch_size_changes_nothing(make_trainer):
    whole, parts = (per_row_inputs(make_trainer(rollout_batch_size=size)) for size in (None, 3))
    assert torch.equal(whole["completion_ids"], parts["completion_ids"])
    assert_close(whole["canvas_logps"], parts["canvas_logps"])


def test_conversational_prompts(make_trainer, tokenizer):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": f"sudoku {i}"}]} for i in range(8)])
    seen = []

    def reward(completions, **kwargs):
        seen.extend(completions)
        return [float(len(c[0]["content"])) for c in completions]

    trainer = DTRPOTrainer(
        model=make_trainer().model,
        reward_funcs=reward,
        args=make_trainer(max_steps=1).args,
        train_dataset=dataset,
        processing_class=chatty,
    )
    trainer.train()
    assert seen[0][0]["role"] == "assistant"


def test_answer_is_greedy_and_in_order(make_trainer):
    trainer = make_trainer(rollout_batch_size=3)
    prompts = make_dataset()["prompt"]
    answers, trajectories = trainer.answer(prompts)
    assert len(answers) == len(trajectories) == 16
    assert answers == trainer.answer(prompts)[0]
    assert answers[5] == trainer.answer([prompts[5]])[0][0]
    assert trainer.answer(prompts[5])[0] == answers[5:6]  # one prompt, not its characters


def test_completions_table(make_trainer, tmp_path):
    trainer = make_trainer(log_completions=True, max_steps=1)
    trainer.train()
    assert list((tmp_path / "completions").glob("*.parquet"))
