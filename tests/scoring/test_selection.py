"""
`score_selection`: log-probabilities of what a step unmasks *and* of its selection, for strategies that look at the sampled
tokens. On toy policies, every outcome of a step is enumerated in float64, and its probability is compared (O13, O14).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.closeness import ROUNDING, assert_close
from tests.conftest import SPECS, make_policy
from tests.reference import rollout
from tests.scoring.toys import MASK, Decoding, Event, Toy, compare, score
from trl_diffusion.decoding.config import DecodingConfig
from trl_diffusion.decoding.strategies import SELECT_BY_SAMPLE
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score as packed_score
from trl_diffusion.trajectories.selection import Selection
from trl_diffusion.trajectories.trajectory import counted_writes


CELLS = 3


def settings(strategy: str, threshold: float, **more) -> DecodingConfig:
    return DecodingConfig(CELLS, temperature=1.0, strategy=strategy, threshold=threshold, score_selection=True, **more)


def with_selection(toy: Toy, config: DecodingConfig, state, writes: list[Event]) -> list[Event]:
    """The writes of a step with their shares of the selection's log-probability."""
    masked = [cell for cell in range(toy.cells) if state[cell] == MASK]
    log_probs = toy.log_probs[toy.numbers[state]][masked]
    tokens = {event.cell: event.token for event in writes}
    unmasked = torch.tensor([cell in tokens for cell in masked])
    shares = config.selection.shares(
        log_probs,
        log_probs,
        torch.tensor([tokens.get(cell, 0) for cell in masked]),
        torch.zeros(len(masked), dtype=torch.long),
        unmasked,
        ~unmasked,
    )
    return [replace(event, logp=event.logp + shares[masked.index(event.cell)]) for event in writes]


CASES = [
    (strategy, count, threshold) for strategy in SELECT_BY_SAMPLE for count in (1, 2) for threshold in (0.45, 0.6)
]


@pytest.mark.parametrize(("strategy", "tokens_per_step", "threshold"), CASES)
def test_a_step_has_the_probability_of_its_outcome(strategy, tokens_per_step, threshold):
    toy, config = Toy(CELLS, 0), settings(strategy, threshold, tokens_per_step=tokens_per_step)
    for state in toy.numbers:
        if MASK not in state:
            continue
        for writes, chance in toy.outcomes(state, config).items():
            if chance == 0:
                continue
            events = [Event(0, cell, token, toy.logp(state, cell, token)) for cell, token in writes]
            found = sum(event.logp for event in with_selection(toy, config, state, events))
            assert found.item() == pytest.approx(chance.log().item(), rel=1e-10)
            torch.testing.assert_close(toy.gradient(found), toy.gradient(chance.log()), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("stop_rule", ["block", "token"])
@pytest.mark.parametrize("tokens_per_step", [1, 2])
@pytest.mark.parametrize("strategy", SELECT_BY_SAMPLE)
def test_o13_holds_with_the_selection(strategy, tokens_per_step, stop_rule):
    """The strategies whose gradient is biased otherwise."""
    toy, config = Toy(CELLS, 0), settings(strategy, 0.6, tokens_per_step=tokens_per_step, stop_rule=stop_rule)
    decodings = toy.decodings(config)
    scored = []
    for decoding in decodings:
        canvas, events = [MASK] * CELLS, []
        for step in range(decoding.events[-1].step + 1):
            writes = [event for event in decoding.events if event.step == step]
            events += with_selection(toy, config, tuple(canvas), writes)
            for event in writes:
                canvas[event.cell] = event.token
        scored.append(Decoding(decoding.chance, tuple(events), decoding.canvas))
    counted = counted_writes(toy.spec, toy.trajectories(decodings), whole_steps=True)
    error, _ = compare(toy, decodings, score(scored, lambda row, event: bool(counted[row, event.cell])))
    assert error <= 1e-10


DECODINGS = {
    "confidence": DecodingConfig(21, 0.7, strategy="sampled_confidence", tokens_per_step=2, score_selection=True),
    "threshold": DecodingConfig(
        22, 1.3, strategy="sampled_threshold", threshold=0.3, tempered_confidence=True, sub_block_size=3,
        score_selection=True, stop_rule="block",
    ),
    "shorter than a block": DecodingConfig(3, 1.0, strategy="sampled_confidence", score_selection=True),
}  # fmt: skip
CONFIGS = {
    "exact": EstimatorConfig("exact"),
    "one draw": EstimatorConfig(),
    "three draws": EstimatorConfig(num_draws=3, step_distribution="uniform"),
}


EDGE = 1e-4  # nats by which a confidence may miss its limit by rounding, and fall on the other side


@pytest.fixture
def scored_with(monkeypatch):
    """Packed scores, with the confidences of positions that were left masked shifted."""
    exactly = Selection.rejected_logps

    def scores(policy, layout, spec, temperature, shift):
        monkeypatch.setattr(
            Selection, "rejected_logps", lambda self, logps, seen, lowest: exactly(self, logps, seen - shift, lowest)
        )
        return packed_score(policy, layout, spec, temperature, compute_entropy=True)

    return scores


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
@torch.no_grad()
def test_o1_recorded_equals_packed(policy, spec, decoding, scored_with):
    """
    Decoding knows what it could have unmasked; scoring finds it from the steps. A token whose confidence is the lowest one of
    the step, or the threshold, but for rounding counts or does not: what was recorded is between the two scores.
    """
    batch = rollout(policy, decoding)
    without = rollout(policy, replace(decoding, score_selection=False))
    assert torch.equal(batch.canvas_ids, without.canvas_ids) and torch.equal(batch.steps, without.steps)
    if spec.block_size > 1:
        assert (batch.logps < without.logps - 0.1).any()
    for config in CONFIGS.values():
        config = replace(config, selection=decoding.selection)
        estimator = ESTIMATORS[config.name]
        states = estimator.states(batch, spec, list(range(len(batch))), config)
        for share in (False, spec.attention == "block"):
            layout = pack(batch, spec, states, estimator.one_row, share)
            low, high = (scored_with(policy, layout, spec, decoding.temperature, shift)[0] for shift in (-EDGE, EDGE))
            logps, entropies = scored_with(policy, layout, spec, decoding.temperature, 0.0)
            scored = layout.weights > 0
            within = batch.logps[scored].clamp(low[scored], high[scored])
            assert_close(batch.logps[scored], within)
            assert (high - low)[scored].gt(ROUNDING).float().mean() < 0.1  # there are few such tokens
            assert (low <= logps).all() and (logps <= high).all()
            assert (logps[~scored] == 0).all() and (entropies[~scored] == 0).all()


def test_another_policy_has_a_finite_score():
    """What the old policy selected may be impossible under the new one, which is a large ratio and no NaN."""
    spec = SPECS["block-from-response"]
    policy = make_policy(spec)
    batch = rollout(policy, DECODINGS["confidence"])
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(60.0)
    config = EstimatorConfig("exact", selection=DECODINGS["confidence"].selection)
    layout = pack(batch, spec, ESTIMATORS["exact"].states(batch, spec, [0] * len(batch), config), one_row=False)
    logps, _ = packed_score(policy, layout, spec)
    logps.sum().backward()
    assert logps.isfinite().all() and all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)
