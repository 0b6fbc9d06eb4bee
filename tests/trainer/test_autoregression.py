"""
O8 of docs/method.md for every option: in blocks of one token, autoregression is what remains, whatever the estimator and its
draws, and the loss is that of TRL's own `GRPOTrainer` on the same causal model and batch.
"""

from __future__ import annotations

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from tests.closeness import assert_close, assert_close_gradients
from tests.conftest import disturb, make_policy
from tests.trainer.conftest import codes, make_dataset
from tests.trainer.test_trainer import causal_logps, per_row_inputs, slice_rows
from trl_diffusion import DiffusionSpec
from trl_diffusion.policies.training import train_padding_token
from trl_diffusion.seeds import derive_seed
from trl_diffusion.trainer.batches import trajectories_of


TEMPERATURE = 0.8
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
NOT_WITHOUT_WEIGHTS = ("dr_grpo", "luspo", "vespo")  # refused with weighting="none"
OPTIONS = {
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

    def build(first_token: str, both: dict | None = None, **options):
        spec = blocks_of_one(tokenizer, first_token)
        model = make_policy(
            spec, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, initializer_range=0.1
        )
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


@pytest.mark.parametrize("name", [*OPTIONS, *BASELINES])
def test_o8_blocks_of_one_give_trl_own_loss(two_trainers, name):
    """Autoregressive first tokens: every token is one, and is in every pass."""
    options = {**OPTIONS, **BASELINES}[name]
    ours, inputs, theirs, plain = two_trainers("autoregressive", **options)
    if name in BASELINES:  # the old policy was asked; it must say what was recorded
        mask = inputs["completion_mask"].bool()
        old = inputs["old_estimates"][:, 0, : mask.shape[1]]
        assert_close(old[mask], plain["old_per_token_logps"][mask])
    losses = [loss for loss in LOSSES if name != "none" or loss not in NOT_WITHOUT_WEIGHTS]
    assert_equal_losses(ours, inputs, theirs, plain, losses)


@pytest.mark.parametrize("name", ["uniform-2", "token-2", "none", "exact"])
def test_o8_denoised_blocks_of_one_give_trl_own_loss(two_trainers, name):
    """Denoised tokens: a block has one step, which any draw draws, with weight 1."""
    ours, inputs, theirs, plain = two_trainers("diffusion", **OPTIONS[name])
    with ours.scoring(inputs) as scored:
        layout = scored.layout
        weights = layout.weights[:, : inputs["completion_mask"].shape[1]]
        torch.testing.assert_close(weights, inputs["completion_mask"].float())
    assert_equal_losses(ours, inputs, theirs, plain, ["grpo", "dapo"])


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
