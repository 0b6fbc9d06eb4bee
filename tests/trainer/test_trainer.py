"""DTRPOTrainer: it trains what it should, its loss is the one the mathematics says, and bad input is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from packaging.version import Version
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen3Config, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser

from tests.closeness import ROUNDING, assert_close, assert_close_gradients, close_to
from tests.conftest import disturb, make_policy
from tests.reference import writes_that_count
from tests.trainer.conftest import codes, make_dataset
from trl_diffusion import DiffusionSpec, DTRPOConfig, DTRPOTrainer, get_spec, tiny_policy_path
from trl_diffusion.decoding.config import RolloutSettings
from trl_diffusion.decoding.options import OLD_NAMES
from trl_diffusion.policies.training import train_padding_token
from trl_diffusion.scoring.draws import StepDraw
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score
from trl_diffusion.scoring.states import drawn_states
from trl_diffusion.trainer.batches import ungroup
from trl_diffusion.trajectories.trajectory import TrajectoryBatch, response_blocks


USUAL_METRICS = [
    "loss",
    "grad_norm",
    "learning_rate",
    "num_tokens",
    "completions/mean_length",
    "completions/clipped_ratio",
    "rewards/codes/mean",
    "rewards/codes/std",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "entropy",
    "clip_ratio/region_mean",
    "step_time",
    "diffusion/tokens_per_step",
    "diffusion/steps_per_response",
    "diffusion/scored_tokens",
    "diffusion/recorded_gap/mean",
    "diffusion/recorded_gap/max",
]


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_full_training(make_trainer, tmp_path, beta, char_spec, tokenizer):
    start = make_policy(char_spec, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    start.save_pretrained(tmp_path / "start")  # the reference is loaded from here
    trainer = make_trainer(str(tmp_path / "start"), beta=beta)
    before = parameters(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 3
    unchanged = [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    assert not unchanged
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    missing = [name for name in USUAL_METRICS + ["kl"] * (beta > 0) if logs[0].get(name) is None]
    assert not missing
    assert logs[0]["diffusion/recorded_gap/max"] < ROUNDING  # on policy: what was recorded is what is scored
    if beta:
        assert all(torch.equal(a, b) for a, b in zip(trainer.ref_model.parameters(), start.parameters(), strict=True))
        assert logs[0]["kl"] < 1e-6 < logs[2]["kl"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_training(make_trainer, checkpointing):
    trainer = make_trainer(
        kwargs={"peft_config": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3)},
        beta=0.1,
        gradient_checkpointing=checkpointing,
    )
    before = parameters(trainer.model)
    trainer.train()
    # On policy at every step, dropout or not: what was recorded is what is scored.
    gaps = [entry["diffusion/recorded_gap/max"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(gaps) < ROUNDING
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
    logs = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert logs[0]["kl"] < 1e-6 < logs[2]["kl"]


def test_trained_model_saves_and_loads_with_its_spec(make_trainer, tmp_path, char_spec):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "trained")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert get_spec(loaded.config) == char_spec
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True))


def test_several_iterations_draw_afresh(make_trainer):
    """Passes over the same rollouts score different steps, and the ratio leaves 1 as the policy moves."""
    trainer = make_trainer(num_iterations=3, tokens_per_step=1, max_steps=3)
    draws, old = [], []
    compute = trainer._get_per_token_logps_and_entropies

    def spy(*args, **kwargs):
        if trainer.scored is not None:
            draws.append(trainer.scored.layout.weights.clone())
        return compute(*args, **kwargs)

    trainer._get_per_token_logps_and_entropies = spy
    loss = trainer._compute_loss

    def spy_on_inputs(model, inputs):
        old.append(inputs["canvas_logps"].clone())
        return loss(model, inputs)

    trainer._compute_loss = spy_on_inputs
    trainer.train()
    assert len(draws) == 3
    assert torch.equal(old[0], old[1]) and torch.equal(old[0], old[2])  # the same rollouts, the same old policy
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["diffusion/recorded_gap/max"] < ROUNDING < logs[2]["diffusion/recorded_gap/max"]


def test_old_logps_come_from_the_recording(make_trainer):
    """A rollout runs the policy under no_grad to decode only; TRL's misaligned case adds no scoring forward."""
    trainer = make_trainer(steps_per_generation=3, gradient_accumulation_steps=1, max_steps=3)
    packed_widths = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            packed_widths.append(kwargs["past_key_values"] is None and torch.is_grad_enabled())
            if kwargs["past_key_values"] is None
            else None
        ),
        with_kwargs=True,
    )
    trainer.train()
    assert packed_widths == [True] * 3  # three updates, three forwards without a cache, each with a gradient


def test_old_logps_can_be_scored_again(make_trainer):
    """With a falsified recording, the ratio is 1 for a policy that does not move, on the first pass and on later ones."""
    trainer = make_trainer(rescore_old_log_probs=True, num_iterations=2, learning_rate=0.0, max_steps=2)
    decode = trainer.decode

    def falsify(*args):
        batch = decode(*args)
        batch.logps = batch.logps - 0.5 * (batch.steps >= 0)
        return batch

    trainer.decode = falsify
    trainer.train()
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        assert entry["diffusion/log_ratio_std"] < ROUNDING and entry["diffusion/kl_to_old"] < 1e-5
        assert entry["diffusion/recorded_gap/mean"] == pytest.approx(0.5, abs=ROUNDING, rel=ROUNDING)


def per_row_inputs(trainer, row_count=8):
    """The local batch that the trainer makes from its first rows."""
    rows = [trainer.train_dataset[i // 4] for i in range(row_count)]
    trainer.model.train()
    return ungroup(trainer._generate_and_score_completions(rows))


def slice_rows(inputs, rows):
    return {k: v[rows] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in inputs.items()}


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("backbone", ["qwen2", "qwen3"])
def test_o8_blocks_of_one_give_trl_own_loss(make_trainer, tokenizer, tmp_path, loss_type, level, backbone):
    """With token shift, autoregressive first tokens and blocks of 1, the loss and gradient are GRPOTrainer's."""
    spec = DiffusionSpec(
        mask_token_id=tokenizer.mask_token_id,
        block_size=1,
        token_shift=True,
        first_token="autoregressive",
        stop_token_ids=(tokenizer.eos_token_id,),
        predicts_mask_token=True,
    )
    model = make_policy(
        spec, backbone=backbone, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, initializer_range=0.1
    )
    model.save_pretrained(tmp_path / "start")
    options = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "beta": 0.05,
        "temperature": 0.8,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
    }
    ours = make_trainer(str(tmp_path / "start"), spec=spec, **options)
    inputs = per_row_inputs(ours)
    disturb(ours.model)  # off policy, so that ratios, clipping and KL all matter
    theirs = GRPOTrainer(
        model=str(tmp_path / "start"),
        reward_funcs=codes,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_completion_length=14,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            **options,
        ),  # fmt: skip
        train_dataset=make_dataset(),
        processing_class=tokenizer,
    )
    theirs.model.load_state_dict(ours.model.state_dict())
    train_padding_token(theirs.model)  # of which transformers drops the gradient

    width = inputs["completion_ids"].shape[1]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    reference = causal_logps(theirs.ref_model, ids, mask, width, 0.8)
    plain = {k: inputs[k] for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")}
    plain["num_items_in_batch"] = inputs["num_items_in_batch"]
    plain["old_per_token_logps"] = inputs["canvas_logps"][:, :width]
    plain["ref_per_token_logps"] = reference

    losses, gradients = [], []
    for trainer, batch in ((ours, inputs), (theirs, plain)):
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer._compute_loss(trainer.model, dict(batch))
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    assert gradients[1].abs().max() > 1e-4
    assert_close(losses[0], losses[1])
    assert_close_gradients(gradients[0], gradients[1])


def causal_logps(model, ids, mask, width, temperature):
    """Log-probabilities of the last `width` tokens under a causal model."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, :-1] / temperature
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)[:, -width:]


def test_o7_loss_does_not_depend_on_how_the_batch_is_cut(make_trainer):
    """One batch of 8, two of 4 accumulated, any order of rows: the same loss and gradient."""
    trainer = make_trainer(per_device_train_batch_size=8, loss_type="dapo", tokens_per_step=1)
    inputs = per_row_inputs(trainer)

    def run(parts, accumulation):
        trainer.model.zero_grad()
        trainer.current_gradient_accumulation_steps = accumulation
        trainer.args.steps_per_generation = accumulation
        total = 0.0
        for part in parts:
            loss = trainer._compute_loss(trainer.model, part)
            loss.backward()
            total += loss.item()
        return total, torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    whole, gradient = run([inputs], 1)
    rows = torch.tensor([5, 0, 3, 6, 1, 7, 2, 4])
    for parts, accumulation in (
        ([slice_rows(inputs, rows)], 1),
        ([slice_rows(inputs, slice(0, 4)), slice_rows(inputs, slice(4, 8))], 2),
        ([slice_rows(inputs, [i]) for i in range(8)], 8),
    ):
        total, other = run(parts, accumulation)
        assert total == close_to(whole)
        assert_close_gradients(other, gradient)


@pytest.mark.slow
def test_expected_loss_is_the_loss_over_all_tokens(make_trainer):
    """Averaged over many draws, the weighted loss of TRL is the loss with every token scored (dapo: linear in them)."""
    trainer = make_trainer(per_device_train_batch_size=8, loss_type="dapo", tokens_per_step=2, beta=0.0)
    inputs = per_row_inputs(trainer)
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    disturb(trainer.model)
    with torch.no_grad():
        losses = []
        for seed in range(600):
            inputs["draw_seeds"] = torch.arange(8) + 8 * seed
            losses.append(trainer._compute_loss(trainer.model, inputs))
        losses = torch.stack(losses).double()
        exact = exact_dapo_loss(trainer, inputs)
    assert losses.std() > 0
    assert abs(losses.mean() - exact) < 4 * losses.std() / len(losses) ** 0.5


def exact_dapo_loss(trainer, inputs):
    """Clipped policy-gradient loss over every token, each scored at the step that unmasked it."""
    with trainer.scoring(inputs):
        pass
    batch = TrajectoryBatch(
        inputs["prompt_ids"], inputs["prompt_mask"], inputs["canvas_ids"], inputs["canvas_steps"],
        inputs["canvas_logps"], inputs["canvas_lengths"], inputs["completion_mask"].sum(1),
    )  # fmt: skip
    blocks = response_blocks(trainer.spec, batch.prompt_lengths, batch.canvas_ids.shape[1])
    logps = torch.zeros_like(batch.logps)
    for step in range(int(batch.steps.max()) + 1):
        every = torch.arange(int(blocks.max()) + 1).expand(len(batch), -1)
        draw = StepDraw(torch.full((*every.shape, 1), step), torch.ones(*every.shape, 1), torch.ones(every.shape))
        layout = pack(batch, trainer.spec, drawn_states(batch, trainer.spec, draw))
        logps = logps + score(trainer.model, layout, trainer.spec)[0]
    ratio = (logps - batch.logps).exp()
    advantages = inputs["advantages"][:, None]
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    counted = writes_that_count(trainer.spec, batch)
    return (losses * counted).sum().double() / counted.sum()


@pytest.mark.parametrize("distribution", ["uniform", "token"])
def test_weighting_none_is_normalised_by_what_it_sums(make_trainer, distribution):
    """With equal weights the dapo loss divides by the expected number of scored tokens, however the batch is cut."""
    trainer = make_trainer(
        per_device_train_batch_size=8, loss_type="dapo", weighting="none", step_distribution=distribution
    )
    inputs = per_row_inputs(trainer)
    totals = []
    with torch.no_grad():
        for seed in range(200):
            inputs["draw_seeds"] = torch.arange(8) + 8 * seed
            with trainer.scoring(inputs) as scored:
                layout = scored.layout
                assert set(layout.weights.unique().tolist()) == {0.0, 1.0}
                totals.append(layout.weights.sum())
        totals = torch.stack(totals)
        tolerance = 4 * totals.std().item() / len(totals) ** 0.5 + 1e-4
        assert abs(inputs["num_items_in_batch"] - totals.mean()) < tolerance
        expected = (
            -(layout.weights * inputs["advantages"][:, None]).sum() / inputs["num_items_in_batch"]
        )  # the ratio is 1
        for accumulation in (1, 2, 8):
            trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = accumulation
            size = 8 // accumulation
            parts = [slice_rows(inputs, slice(i, i + size)) for i in range(0, 8, size)]
            loss = sum(trainer._compute_loss(trainer.model, part) for part in parts)
            assert loss.item() == close_to(expected.item())


def test_evaluation_does_not_move_the_random_streams(make_trainer):
    plain, evaluated = (
        make_trainer(),
        make_trainer(kwargs={"eval_dataset": make_dataset(4)}, per_device_eval_batch_size=4),
    )
    evaluated.evaluate()
    first, second = per_row_inputs(plain), per_row_inputs(evaluated)
    assert torch.equal(first["draw_seeds"], second["draw_seeds"])
    assert torch.equal(first["canvas_ids"], second["canvas_ids"])


@pytest.mark.parametrize("checkpointing", [True, False])
def test_bf16_computes_in_bf16_and_scores_in_float32(make_trainer, checkpointing):
    """`bf16=True`: the layers run in bfloat16, and a log-probability is that of the bfloat16 logits to float32 precision."""
    trainer = make_trainer(bf16=True, use_cpu=True, gradient_checkpointing=checkpointing, max_steps=2)
    inputs, outputs, scores = set(), [], []
    head = trainer.model.get_output_embeddings()
    trainer.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, a, out: inputs.add(out.dtype))
    head.register_forward_hook(lambda m, a, out: outputs.append(out.detach()) if torch.is_grad_enabled() else None)
    log_scores = trainer.log_scores

    def spy(logps):
        layout = trainer.scored.layout
        scores.append((logps, layout.targets, layout.responses, layout.canvas_columns))
        log_scores(logps)

    trainer.log_scores = spy
    trainer.train()
    assert inputs == {torch.bfloat16} and all(p.dtype == torch.float32 for p in trainer.model.parameters())
    logps, targets, responses, columns = scores[0]
    assert logps.dtype == torch.float32 and not torch.equal(logps, logps.bfloat16().float())
    logits = outputs[0][0].double()
    logits[:, trainer.spec.mask_token_id] = -torch.inf
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert_close(logps[responses, columns].double(), expected)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["diffusion/recorded_gap/max"] < 0.2  # in bfloat16, either pass rounds for itself


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(make_trainer, value):
    trainer = make_trainer(max_steps=3)

    def poison(module, args, output):
        if torch.is_grad_enabled() and trainer.state.global_step == 1:
            return output * value
        return output

    trainer.model.get_output_embeddings().register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match="The loss is nan after 1 optimizer steps"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="TRL knew the tokenizer's end token only")
def test_truncated_responses_are_masked(make_trainer, tokenizer):
    """Responses without a stop token carry no weight, and those with one do, whichever token it is."""
    trainer = make_trainer(
        mask_truncated_completions=True,
        per_device_train_batch_size=8,
        diffusion_spec={"stop_token_ids": list(range(40, 60))},
        max_completion_length=6,
        tokens_per_step=1,
    )
    inputs = per_row_inputs(trainer)
    with trainer.scoring(inputs) as scored:
        layout = scored.layout
        scored = (layout.weights > 0).any(1)
    stops = torch.tensor(trainer.spec.stop_token_ids, device=scored.device)
    ended = torch.isin(inputs["canvas_ids"][:, :6], stops).any(1)
    ended |= inputs["completion_ids"][:, -1] == tokenizer.pad_token_id  # TRL takes padding for an end, too
    assert ended.any() and not ended.all()
    assert torch.equal(scored, ended)


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


def test_evaluation_during_training(make_trainer):
    trainer = make_trainer(
        kwargs={"eval_dataset": make_dataset(4)},
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=4,
        max_steps=2,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert len(logs) == 1
    assert {"eval_loss", "eval_rewards/codes/mean", "eval_diffusion/scored_tokens"} <= set(logs[0])


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


def test_completions_table(make_trainer, tmp_path):
    trainer = make_trainer(log_completions=True, max_steps=1)
    trainer.train()
    assert list((tmp_path / "completions").glob("*.parquet"))


# ------------------------------------------------------------------------------------------------------- bad input


def test_policy_without_a_mask_token(make_trainer, tokenizer):
    model = AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )  # fmt: skip
    )
    with pytest.raises(ValueError, match="no diffusion spec: nothing says which token stands for"):
        make_trainer(model)
    trainer = make_trainer(model, diffusion_spec={"mask_token_id": 1, "block_size": 4, "stop_token_ids": [2]})
    assert get_spec(trainer.model.config).block_size == 4


def test_spec_overrides_what_the_config_says(make_trainer):
    trainer = make_trainer(diffusion_spec='{"block_size": 4}')
    assert trainer.spec.block_size == get_spec(trainer.model.config).block_size == 4
    assert trainer.spec.stop_token_ids == (2,)
    with pytest.raises(ValueError, match="`mask_token_id` holds 5000, but the model's vocabulary has 100 tokens"):
        make_trainer(diffusion_spec={"mask_token_id": 5000})


@pytest.mark.parametrize("in_eval", [False, True])
def test_prompt_with_the_mask_token(make_trainer, in_eval):
    good, bad = make_dataset(4), Dataset.from_list([{"prompt": "fine"}, {"prompt": "a <mask> b"}])
    with pytest.raises(ValueError, match=r"rows 0 to 1: Prompt 1 contains the mask token \(1\) at position 2"):
        make_trainer(dataset=good if in_eval else bad, kwargs={"eval_dataset": bad} if in_eval else None)


def test_prompt_longer_than_the_context(make_trainer):
    dataset = Dataset.from_list([{"prompt": "1" * 120}])
    with pytest.raises(ValueError, match="Prompt 0 has 120 tokens.*context of 128"):
        make_trainer(dataset=dataset)


def test_dataset_without_prompts(make_trainer):
    with pytest.raises(ValueError, match=r"no `prompt` column; it has \['question'\]"):
        make_trainer(dataset=Dataset.from_list([{"question": "1+1"}]))


def test_empty_dataset(make_trainer):
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        make_trainer(dataset=Dataset.from_dict({"prompt": []}))


def test_no_dataset(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        DTRPOTrainer(tiny_policy_path(), codes, DTRPOConfig(str(tmp_path), bf16=False), processing_class=tokenizer)


@pytest.mark.parametrize("reward_funcs", [None, []])
def test_no_reward_function(make_trainer, reward_funcs):
    with pytest.raises(ValueError, match="No reward source provided"):
        make_trainer(reward_funcs=reward_funcs)


def test_images_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"has \['image'\]"):
        make_trainer(dataset=Dataset.from_list([{"prompt": "a", "image": "b"}]))


def test_streams_are_checked_as_they_come(make_trainer):
    stream = IterableDataset.from_generator(lambda: ({"prompt": p} for p in ["ok"] * 4 + ["a<mask>"] * 60))
    trainer = make_trainer(dataset=stream, max_steps=8)
    with pytest.raises(ValueError, match="contains the mask token"):
        trainer.train()


def test_a_policy_spread_over_devices_is_refused(make_trainer):
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy_path())
    policy.hf_device_map = {"model.embed_tokens": 0, "model.layers": 1}
    with pytest.raises(ValueError, match="spread over 2 devices \\(0, 1\\).*accelerate launch"):
        make_trainer(model=policy)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (7, "must be text or a list of messages, got 7"),
        (["a", "b"], "must be text or a list of messages"),
        ({"role": "user", "content": "a"}, "must be text or a list of messages"),
        ([{"role": "user"}], "must have a `role` and a `content`"),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "take text only"),
    ],
)
def test_prompts_that_are_not_text(make_trainer, prompt, message):
    with pytest.raises(ValueError, match=f"train_dataset: row 0.*{message}"):
        make_trainer(dataset=Dataset.from_list([{"prompt": prompt}]))


def test_columns_that_reward_functions_would_not_see(make_trainer):
    with pytest.raises(ValueError, match=r"has \['completions'\]"):
        make_trainer(dataset=Dataset.from_list([{"prompt": "a", "completions": "b"}]))


def test_tokenizers_that_cannot_be_used(make_trainer, tokenizer, tmp_path, char_spec):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ValueError, match="neither a padding token nor an end-of-text token"):
        make_trainer(kwargs={"processing_class": bare})
    make_policy(char_spec, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="every prompt into no tokens at all.*processing_class"):
        make_trainer(str(tmp_path / "alone"), kwargs={"processing_class": None})


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


@pytest.mark.parametrize(("gpu", "options", "expected"), [
    (True, {}, True), (True, {"fp16": True}, False), (True, {"use_cpu": True}, False), (True, {"bf16": False}, False),
    (False, {}, False), (False, {"use_cpu": True, "bf16": True}, True),
])  # fmt: skip
def test_bfloat16_is_the_default_where_a_gpu_has_it(tmp_path, monkeypatch, gpu, options, expected):
    for module in ("trl_diffusion.trainer.config", "transformers.training_args"):
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: gpu)
    assert DTRPOConfig(str(tmp_path), **options).bf16 is expected


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


@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory"])
def test_arguments_without_meaning_are_refused(make_trainer, name):
    with pytest.raises(ValueError, match=f"`{name}` is not supported"):
        make_trainer(kwargs={name: [print]})


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


# ------------------------------------------------------------------------------------------------------------ config


def test_every_option_has_a_help_text_and_a_line_in_the_docstring():
    own = set(DTRPOConfig.__dataclass_fields__) - set(GRPOConfig.__dataclass_fields__)
    settings = set(RolloutSettings.__dataclass_fields__)
    assert len(own - settings - set(OLD_NAMES)) == 16 and settings < own
    for name in own:
        assert DTRPOConfig.__dataclass_fields__[name].metadata["help"]
        texts = RolloutSettings.__doc__ if name in settings else DTRPOConfig.__doc__
        assert f"\n        {name} (" in texts or name in OLD_NAMES


def test_parser_reads_yaml_and_the_command_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    spec = {"mask_token_id": 7, "block_size": 4}
    path.write_text(f"output_dir: {tmp_path}\nbf16: false\ntokens_per_step: 3\ndiffusion_spec: '{json.dumps(spec)}'\n")
    parser = TrlParser((DTRPOConfig, ModelConfig))
    config, _ = parser.parse_args_and_config(["--config", str(path), "--tokens_per_step", "2"])
    assert config.tokens_per_step == 2 and config.diffusion_spec == spec


# ----------------------------------------------------------------------------------------------------- other policies


@pytest.mark.parametrize("token_shift", [False, True])
def test_full_attention_policy_trains(make_trainer, tokenizer, token_shift):
    """One state of the whole trajectory per draw, several draws in one batched forward."""
    spec = DiffusionSpec(
        mask_token_id=tokenizer.mask_token_id, attention="full", block_size=8, block_origin="response",
        token_shift=token_shift, stop_token_ids=(tokenizer.eos_token_id,),
    )  # fmt: skip
    trainer = make_trainer(spec=spec, num_draws=3)
    before = parameters(trainer.model)
    trainer.train()
    assert not [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["diffusion/recorded_gap/max"] < ROUNDING
    assert logs[0]["diffusion/scored_tokens"] <= 3 * trainer.args.tokens_per_step


def test_lora_targets_that_match_nothing_are_named(make_trainer):
    config = LoraConfig(r=4, target_modules=["q_proj", "attn_out", "ff_proj"])
    message = r"\['attn_out', 'ff_proj'\] match nothing in Qwen3ForCausalLM. Its linear layers are \['down_proj', .*'v_proj'\]"
    with pytest.raises(ValueError, match=message):
        make_trainer(kwargs={"peft_config": config})
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_policy_path(), kwargs={"peft_config": config})


def test_objects_of_another_type(make_trainer, tokenizer, tmp_path):
    with pytest.raises(TypeError, match="`train_dataset` must be a Dataset or an IterableDataset, got list"):
        make_trainer(dataset=[{"prompt": "a"}])
    with pytest.raises(TypeError, match="`model` must be a path, a hub id or a model, got int"):
        make_trainer(7)
    with pytest.raises(TypeError, match="`args` must be a DTRPOConfig, got GRPOConfig"):
        DTRPOTrainer(tiny_policy_path(), codes, GRPOConfig(str(tmp_path), bf16=False), make_dataset())


def test_empty_prompt(make_trainer):
    with pytest.raises(ValueError, match="train_dataset: row 1 has no prompt"):
        make_trainer(dataset=Dataset.from_list([{"prompt": "a"}, {"prompt": ""}]))
    with pytest.raises(ValueError, match="no prompt to answer"):
        make_trainer().answer([])


def test_tokenizer_of_another_model(make_trainer, char_spec):
    with pytest.raises(
        ValueError, match="holds token .*, but the model's vocabulary has 40 tokens. Is this the model's"
    ):
        make_trainer(make_policy(char_spec))


def test_reference_of_an_unsaved_model(make_trainer):
    with pytest.raises(ValueError, match="not loaded from anywhere. Save it and pass the path"):
        make_trainer(beta=0.1)


@pytest.mark.parametrize("rescore", [False, True])
def test_what_an_approximate_cache_costs_is_logged(make_trainer, char_spec, rescore):
    """The gap between recorded and scored log-probabilities: nothing but rounding without one; and the old policy's
    log-probabilities can be computed again."""
    spec = char_spec.replace(attention="full", block_origin="response", block_size=4)
    gaps, ratios = {}, {}
    for cache in (None, "dual"):
        trainer = make_trainer(
            spec=spec,
            diffusion_spec=spec.to_dict(),
            approximate_cache=cache,
            rescore_old_log_probs=rescore,
            max_steps=1,
            tokens_per_step=1,
        )
        trainer.train()
        logs = next(entry for entry in trainer.state.log_history if "loss" in entry)
        gaps[cache], ratios[cache] = logs["diffusion/recorded_gap/max"], logs["diffusion/log_ratio_std"]
        assert trainer.last_rollouts.cache == (cache or "exact")
    assert gaps[None] < ROUNDING < 1e-2 < gaps["dual"]
    assert ratios["dual"] < ROUNDING if rescore else ratios["dual"] > 1e-3
