"""The loss is the one the mathematics says."""

from __future__ import annotations

import pytest
import torch
import trl
from packaging.version import Version

from tests.closeness import assert_close_gradients, close_to
from tests.conftest import disturb
from tests.reference import writes_that_count
from tests.trainer.conftest import per_row_inputs, slice_rows
from trl_diffusion.scoring.draws import StepDraw
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score
from trl_diffusion.scoring.states import drawn_states
from trl_diffusion.trajectories.trajectory import TrajectoryBatch, response_blocks


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
        for seed in range(250):
            inputs["draw_seeds"] = torch.arange(8) + 8 * seed
            losses.append(trainer._compute_loss(trainer.model, inputs))
        losses = torch.stack(losses).double()
        exact = exact_dapo_loss(trainer, inputs)
    assert losses.std() > 0
    assert abs(losses.mean() - exact) < 5 * losses.std() / len(losses) ** 0.5


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
