"""
What DTRPOTrainer relies on in TRL beyond its documented interface. Each test names the thing that moved when it fails.
"""

from __future__ import annotations

import ast
import inspect
import textwrap

import pytest
import torch
from transformers import Trainer
from trl import GRPOTrainer

from tests.reference import writes_that_count
from tests.trainer.conftest import per_row_inputs
from trl_diffusion import DTRPOTrainer
from trl_diffusion.trainer.batches import trajectories_of


OVERRIDDEN = {
    "_generate_single_turn": ["self", "prompt_ids"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_get_per_token_logps_and_entropies": ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
    "_compute_loss": ["self", "model", "inputs"],
    "get_high_entropy_mask": ["self", "entropies", "mask", "threshold"],
    "_tokenize_prompts": ["self", "prompts"],
}
# What a resumed run needs: the place in the data, and the rollout beside the random state.
RESUMING = {
    "_get_train_sampler": ["self"],
    "_init_training_state": [
        *("self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"),
    ],
    "_save_rng_state": ["self", "output_dir"],
    "_save_checkpoint": ["self", "model", "trial"],
    # Tied weights, which a checkpoint has under one name.
    "_issue_warnings_after_load": ["self", "load_result"],
    # A family's own weight names.
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_best_model": ["self"],
}
# What figures over rows need.
EVALUATING = {
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "evaluation_loop": [
        *("self", "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"),
    ],
    "evaluate": ["self", "eval_dataset"],
    "predict": ["self", "test_dataset"],
    "get_eval_dataloader": ["self", "eval_dataset"],
    "get_test_dataloader": ["self", "test_dataset"],
    "log": ["self", "logs", "start_time"],
}
# What stored responses need: their columns, with `remove_unused_columns=True`.
READING = {"_set_signature_columns_if_needed": ["self"]}
# What people see, and what is left in a directory.
SHOWING = {
    "add_callback": ["self", "callback"],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
    "save_model": ["self", "output_dir", "_internal_call"],
}
METHODS = {**OVERRIDDEN, **RESUMING, **EVALUATING, **READING, **SHOWING}


@pytest.mark.parametrize("method", METHODS)
def test_signatures_of_overridden_methods(method):
    parameters = list(inspect.signature(getattr(GRPOTrainer, method)).parameters)
    expected = METHODS[method]
    assert parameters[: len(expected)] == expected or parameters[:1] + ["*"] == ["self", "*"], (
        f"GRPOTrainer.{method} now takes {parameters}; DTRPOTrainer overrides it expecting {expected} first."
    )


def test_train_takes_what_transformers_takes():
    for name in ("trial", "ignore_keys_for_eval"):
        assert name in inspect.signature(GRPOTrainer.train).parameters
    inspect.signature(DTRPOTrainer.train).bind("self", None, None, None)  # by position, too


def calls_unpacked_as(method: str, callee: str) -> list[int]:
    """Number of names that each call of `self.<callee>` inside a method of GRPOTrainer is unpacked into."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(GRPOTrainer, method))))
    return [
        len(node.targets[0].elts)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Call)
        and getattr(node.value.func, "attr", None) == callee
    ]


@pytest.mark.parametrize(
    ("method", "callee", "arity"),
    [
        ("_generate", "_generate_single_turn", 2),
        ("_generate_and_score_completions", "_get_per_token_logps_and_entropies", 3),
        ("_compute_loss", "_get_per_token_logps_and_entropies", 3),
    ],
)
def test_number_of_values_returned(method, callee, arity):
    found = calls_unpacked_as(method, callee)
    assert found, f"GRPOTrainer.{method} no longer calls self.{callee}: DTRPOTrainer's override would never run."
    assert set(found) == {arity}, f"GRPOTrainer.{method} unpacks self.{callee} into {found} values, not {arity}."


def test_where_a_run_is_inside_a_rollout():
    source = inspect.getsource(GRPOTrainer._prepare_inputs)
    for name in ("self._step", "self._buffered_inputs"):
        assert name in source, f"GRPOTrainer._prepare_inputs no longer goes by `{name}`, which checkpoints keep."


def test_what_is_kept_between_steps(make_trainer):
    """What a checkpoint keeps of TRL's and transformers' trainers is there."""
    trainer = make_trainer(max_steps=1)
    assert trainer._step == 0 and trainer._buffered_inputs is None
    assert set(trainer._metrics) == {"train", "eval"}
    assert set(trainer._logs) == {"images", "prompt", "completion", "rewards", "advantages", "extra"}
    source = inspect.getsource(Trainer._inner_training_loop)
    begun = source.index("on_train_begin")
    for name in ("self._tr_loss", "self._total_loss_scalar", "self._globalstep_last_logged"):
        assert f"{name} = " in source[:begun], f"transformers no longer sets `{name}` before a run begins."


def test_only_these_methods_are_overridden():
    parts = DTRPOTrainer.__mro__[: DTRPOTrainer.__mro__.index(GRPOTrainer)]
    ours = {name for part in parts for name in vars(part)}
    shared = {name for name in ours if not name.startswith("__")} & set(dir(GRPOTrainer))
    assert shared - {"_tag_names", "_name", "_paper", "_abc_impl"} == {*METHODS, "train"}, (
        f"DTRPOTrainer hides {sorted(shared)} of GRPOTrainer: a name of ours collides with one of TRL's."
    )


def test_keys_of_a_rollout(make_trainer):
    trainer = make_trainer()
    output = per_row_inputs(trainer)
    expected = {
        "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch",
        "sampling_per_token_logps",
    }  # fmt: skip
    missing = expected - set(output)
    assert not missing, f"_generate_and_score_completions no longer returns {sorted(missing)}."
    assert output["num_items_in_batch"] == writes_that_count(trainer.spec, trajectories_of(output)).sum()
    columns = output["completion_mask"].bool()
    width = columns.shape[1]
    assert torch.equal(output["canvas_ids"][:, :width][columns], output["completion_ids"][columns])
    torch.testing.assert_close(
        output["canvas_logps"][:, :width][columns], output["sampling_per_token_logps"][columns], atol=0, rtol=0
    )


def test_extra_tensors_survive_shuffling_and_splitting(make_trainer):
    """After `_prepare_inputs`, each row still has its own trajectory."""
    trainer = make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=4, num_generations=4)
    trainer.model.train()
    rows = [trainer.train_dataset[i // 4] for i in range(8)]
    seen = []
    for step in range(4):
        trainer._step = step
        inputs = trainer._prepare_inputs(rows)
        for key in ("canvas_ids", "canvas_steps", "canvas_logps", "canvas_lengths", "draw_seeds"):
            assert key in inputs, f"`{key}`, added to the rollout's output, did not reach the loss."
            assert len(inputs[key]) == 2
        columns = inputs["completion_mask"].bool()
        ids = inputs["canvas_ids"][:, : columns.shape[1]]
        assert torch.equal(ids[columns], inputs["completion_ids"][columns]), "TRL shuffled rows, but not all tensors."
        seen += inputs["draw_seeds"].tolist()
    assert len(set(seen)) == 8


def test_loss_uses_the_completion_mask_as_weights(make_trainer):
    """TRL's loss is linear in the completion mask, which is where the weights of the scored tokens go."""
    trainer = make_trainer(per_device_train_batch_size=8, loss_type="dapo")
    inputs = per_row_inputs(trainer)
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    width = inputs["completion_ids"].shape[1]
    logps = torch.randn(8, width, device=inputs["completion_ids"].device)
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logps, torch.zeros_like(logps), None)
    weights = torch.rand_like(logps)
    plain = dict(inputs, completion_mask=weights, old_per_token_logps=logps)
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, plain)
    expected = -(weights * inputs["advantages"][:, None]).sum() / inputs["num_items_in_batch"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5), (
        "GRPOTrainer._compute_loss no longer multiplies the per-token loss by `completion_mask`."
    )


def test_causal_fused_head_is_never_called(make_trainer, tmp_path, char_spec, tokenizer):
    """TRL's fused LM head shifts labels by one: on a diffusion policy it would be silently wrong."""
    from tests.conftest import make_policy

    start = make_policy(char_spec, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    start.save_pretrained(tmp_path / "start")
    trainer = make_trainer(
        str(tmp_path / "start"), beta=0.1, steps_per_generation=3, gradient_accumulation_steps=1, max_steps=2
    )
    calls = []
    for model in (trainer.model, trainer.ref_model):
        forward = model.forward

        def sentinel(*args, forward=forward, **kwargs):
            assert not kwargs.get("fused_lm_head"), "TRL called its causal fused LM head on a diffusion policy."
            assert "labels" not in kwargs, "TRL asked a diffusion policy for its causal loss."
            calls.append(kwargs["attention_mask"].dim())
            return forward(*args, **kwargs)

        model.forward = sentinel
    trainer.train()
    assert calls and set(calls) == {4}  # every forward of policy and reference is ours, with an explicit mask
