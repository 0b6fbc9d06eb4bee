"""Where the old policy's log-probabilities come from: the recording, or a pass of their own."""

from __future__ import annotations

import pytest
import torch

from tests.closeness import ROUNDING
from trl_diffusion.policies.forward import CACHE


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
        lambda module, args, kwargs: packed_widths.append(torch.is_grad_enabled()) if kwargs[CACHE] is None else None,
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
