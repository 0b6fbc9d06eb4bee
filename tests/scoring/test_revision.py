"""
Trajectories in which tokens are taken back: O10 (packed scores are those of a replay of the event log, and the recorded ones), O11
(without revisions everything is as before) and O12 (draws are unbiased with several writes at a position), on random event logs
and on those of the decoder. O6 and O7 for such trajectories as well.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.closeness import ROUNDING, assert_close, assert_close_gradients
from tests.conftest import MASK, SPECS, STOP, make_policy, make_prompts
from tests.events import batch_of, events_of, is_autoregressive, moments, prompt_of, random_batch, replayed_logps
from tests.reference import another, possible_sets
from trl_diffusion import DecodingConfig, decode
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score
from trl_diffusion.trajectories.revisions import Revisions
from trl_diffusion.trajectories.selection import Selection
from trl_diffusion.trajectories.trajectory import NEVER, TrajectoryBatch


TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# The kinds of specs that the families have, with short blocks.
KINDS = {
    "block-from-sequence": SPECS["block-from-sequence"].replace(block_size=4),
    "block-from-response": SPECS["block-from-response"].replace(block_size=3),
    "shift-autoregressive-first": SPECS["shift-autoregressive-first"].replace(block_size=4),
    "mask-predicted": SPECS["mask-predicted"].replace(block_size=2),
    "clean-causal-autoregressive-first": SPECS["clean-causal-autoregressive-first"].replace(block_size=3),
    "full": SPECS["full"].replace(block_size=4),
    "full-shift": SPECS["full-shift"].replace(block_size=3),
}
POLICIES = {name: make_policy(spec, **TINY) for name, spec in KINDS.items()}
PROPERTY = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}


def packed(policy, spec, batch, config, seeds=None, temperature=1.0, share=False, one_row=None):
    """Scores and weights of an estimator, `(R, E)` each."""
    estimator = ESTIMATORS[config.name]
    states = estimator.states(batch, spec, list(range(len(batch))) if seeds is None else seeds, config)
    layout = pack(batch, spec, states, estimator.one_row if one_row is None else one_row, share)
    return score(policy, layout, spec, temperature)[0], layout.weights


def written(batch: TrajectoryBatch) -> torch.Tensor:
    """Columns that hold a write, boolean, `(R, E)`."""
    return torch.cat([batch.steps, batch.revisions.steps], 1) >= 0


# ------------------------------------------------------------------------------------------------ O10: random event logs


@given(
    name=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.7, 1.0]),
    one_row=st.booleans(),
    share=st.booleans(),
    distribution=st.sampled_from(["uniform", "token", "importance"]),
    num_draws=st.integers(1, 4),
    num_blocks=st.sampled_from([None, None, 1, 2]),
)
@settings(max_examples=150, **PROPERTY)
@torch.no_grad()
def test_o10_packed_scores_are_those_of_a_replay(
    name, seed, temperature, one_row, share, distribution, num_draws, num_blocks
):
    """Every write of a random log, in the pass over all steps and in one over drawn steps; and the weights of the draw."""
    spec, policy, rng = KINDS[name], POLICIES[name], random.Random(seed)
    batch = random_batch(rng, spec)
    expected = replayed_logps(policy, spec, batch, temperature).float()
    share &= spec.attention == "block"

    found, weights = packed(policy, spec, batch, EstimatorConfig("exact"), None, temperature, share, one_row)
    assert torch.equal(weights, written(batch).float())
    assert_close(found, expected)

    if spec.attention == "full":
        num_blocks = None
    config = EstimatorConfig(step_distribution=distribution, num_draws=num_draws, num_blocks=num_blocks)
    found, weights = packed(policy, spec, batch, config, [seed + row for row in range(3)], temperature, share)
    assert_close(found, torch.where(weights > 0, expected, 0.0))
    for row in range(len(batch)):
        check_draw(spec, batch, row, weights[row].tolist(), config)


def sizes_of(batch, row, writes: dict[int, list[int]], distribution: str) -> dict[int, float]:
    """The size of each step of a region, given the columns of its writes (docs/method.md, section 2)."""
    if distribution != "importance":
        return {step: len(columns) if distribution == "token" else 1 for step, columns in writes.items()}
    logps = torch.cat([batch.logps, batch.revisions.logps], 1)[row].double()
    masses = {step: sum(1 - logps[column].exp().item() for column in columns) for step, columns in writes.items()}
    if not (total := sum(masses.values())):
        return dict.fromkeys(writes, 1)
    return {step: 0.9 * mass / total + 0.1 / len(writes) for step, mass in masses.items()}


def inverse_chances(sizes: dict[int, float], num_draws: int) -> dict[int, float]:
    """One over the probability with which each step is among `num_draws` that are drawn in proportion to size."""
    rest, left, found = dict(sizes), min(num_draws, len(sizes)), {}
    while sure := [t for t, size in rest.items() if size * left >= sum(rest.values()) * (1 - 1e-9)]:
        for step in sure:
            found[step] = 1.0
            del rest[step]
        left -= len(sure)
    return found | {step: sum(rest.values()) / (size * left) for step, size in rest.items()}


def drawable_writes(spec, batch, row) -> tuple[dict[int, dict[int, list[int]]], dict[int, list[int]]]:
    """The columns of the writes of each step of each region, and the autoregressive ones of each region."""
    drawable: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    always: dict[int, list[int]] = defaultdict(list)
    length = len(prompt_of(batch, row))
    for event in events_of(spec, batch, row):
        if event.token is not None and is_autoregressive(spec, length, event.position):
            always[event.region].append(event.column)
        elif event.token is not None:
            drawable[event.region][event.step].append(event.column)
    return drawable, always


def check_draw(spec, batch, row, weights: list[float], config: EstimatorConfig) -> None:
    """A draw takes steps with writes, whole ones, and weighs them by one over the probability of their being drawn."""
    drawable, always = drawable_writes(spec, batch, row)
    regions = sorted({*drawable, *always})
    picked = [region for region in regions if any(weights[c] for c in always[region])]
    picked += [r for r in regions if r not in picked and any(weights[c] for cs in drawable[r].values() for c in cs)]
    number = len(regions) if config.num_blocks is None else min(config.num_blocks, len(regions))
    assert len(picked) == number
    assert not any(weight for weight, holds in zip(weights, written(batch)[row].tolist(), strict=True) if not holds)
    for region in picked:
        factor = len(regions) / number
        assert all(weights[column] == pytest.approx(factor) for column in always[region])
        steps = drawable[region]
        expected = inverse_chances(sizes_of(batch, row, steps, config.step_distribution), config.num_draws)
        hit = [step for step, columns in steps.items() if weights[columns[0]]]
        assert len(hit) == min(config.num_draws, len(steps))
        for step, columns in steps.items():
            weight = factor * expected[step] if step in hit else 0.0
            assert [weights[column] for column in columns] == pytest.approx([weight] * len(columns), rel=1e-5)


def test_random_logs_cover_the_hard_cases():
    """The logs above really are what they are said to be."""
    found = Counter()
    for seed, (_, spec) in itertools.product(range(20), KINDS.items()):
        batch = random_batch(random.Random(seed), spec)
        for row in range(len(batch)):
            events, length = events_of(spec, batch, row), int(batch.canvas_lengths[row])
            writes = Counter(event.position for event in events if event.token is not None)
            steps = moments(events)
            found["five writes"] += max(writes.values(), default=0) == 5
            found["never written"] += any(position not in writes for position in range(length))
            found["erased in the end"] += any((batch.steps[row, p] == NEVER).item() for p in writes)
            found["edit"] += len(batch.revisions.steps[row] >= 0) > sum(event.token is None for event in events)
            found["only erases"] += any(all(e.token is None for e in here) for here in steps.values())
            found["both"] += any(len({e.token is None for e in here}) == 2 for here in steps.values())
            found["more steps than positions"] += max((step for _, step in steps), default=0) >= length
            found["padding"] += bool((batch.revisions.steps[row] < 0).any())
            found["same prompt"] += row > 0 and prompt_of(batch, row) == prompt_of(batch, row - 1)
    assert len(found) == 9 and min(found.values()) >= 10, found


# ----------------------------------------------------------------------------------------------- O10: logs of the decoder

REVISING = {
    "confidence": {"revision": "confidence", "revision_threshold": 0.5, "tokens_per_step": 2},
    "confidence-scheduled": {
        "revision": "confidence", "revision_threshold": 0.9, "steps_per_block": 7, "revision_max": 3, "revision_limit": 4,
    },
    "self-planning": {"revision": "self_planning", "strategy": "entropy", "tokens_per_step": 3, "temperature": 1.5},
    "random": {"revision": "random", "revision_rate": 0.5, "strategy": "threshold", "threshold": 0.3},
    "edit": {"revision": "edit", "edit_threshold": 0.2, "revision_max": 4, "temperature": 0.7},
    "sampled-edit": {"revision": "sampled_edit", "edit_threshold": 0.1, "revision_steps": 5, "tokens_per_step": 2},
}  # fmt: skip


def rollout(policy, spec, temperature=1.0, max_new_tokens=19, seed=0, **options) -> TrajectoryBatch:
    config = DecodingConfig(max_new_tokens, temperature, **options)
    prompts = make_prompts((3, 8, 13, 1))
    return decode(policy, prompts, config, spec, seeds=[seed + row for row in range(len(prompts))])


def can_edit(spec):
    """The spec of a policy that was trained to predict visible tokens, which some decoders ask for."""
    return spec.replace(predicts_visible_tokens=True)


@pytest.mark.parametrize("options", REVISING.values(), ids=REVISING)
@torch.no_grad()
def test_o10_recorded_scores_are_those_of_a_replay_and_of_the_packed_pass(policy, spec, options):
    """For the families' own checkpoints, too."""
    spec = can_edit(spec).replace(stop_token_ids=tuple(range(STOP, STOP + 6)))
    temperature = options.get("temperature", 1.0)
    batch = rollout(policy, spec, **options)
    recorded = torch.cat([batch.logps, batch.revisions.logps], 1)
    assert_close(recorded, replayed_logps(policy, spec, batch, temperature).float())
    for config in (EstimatorConfig("exact"), EstimatorConfig(num_draws=2)):
        found, weights = packed(policy, spec, batch, config, None, temperature, share=spec.attention == "block")
        assert_close(found, torch.where(weights > 0, recorded, 0.0))
        assert config.name != "exact" or torch.equal(weights > 0, written(batch))


def test_the_decoder_covers_the_hard_cases():
    """Tokens are taken back in every way, stop tokens among them, which are then written again or not."""
    found = Counter()
    stops = set(range(STOP, STOP + 6))
    for name in ("block-from-sequence", "full"):
        spec = can_edit(SPECS[name]).replace(stop_token_ids=tuple(stops))
        for kind, options in REVISING.items():
            batch = rollout(make_policy(spec), spec, **options)
            for row in range(len(batch)):
                events = events_of(spec, batch, row)
                positions = Counter(event.position for event in events if event.token is not None)
                found[name, kind] += max(positions.values()) > 1
                found["more than one region"] += len({event.region for event in events}) > 1
                taken = {int(t) for t, step in zip(batch.revisions.tokens[row], batch.revisions.steps[row], strict=True)
                         if step >= 0}  # fmt: skip
                stopped = batch.completions()[row][-1] in stops
                found["stop token taken back, and a stop"] += bool(taken & stops) and stopped
                found["stop token taken back, and none"] += bool(taken & stops) and not stopped
    assert len(found) == 2 * len(REVISING) + 3 and min(found.values()) >= 1, found


SELECTED = {
    "confidence": {"revision": "confidence", "strategy": "sampled_confidence", "tokens_per_step": 2},
    "edit": {"revision": "edit", "edit_threshold": 0.2, "strategy": "sampled_confidence", "temperature": 1.3},
    "random": {"revision": "random", "revision_rate": 0.4, "strategy": "sampled_threshold", "threshold": 0.3},
    "edit-threshold": {
        "revision": "edit", "edit_threshold": 0.2, "revision_max": 3, "strategy": "sampled_threshold", "threshold": 0.2,
    },
    "confidence-scheduled": {
        "revision": "confidence", "strategy": "sampled_confidence", "steps_per_block": 6, "revision_max": 3,
    },
}  # fmt: skip
EDGE = 1e-4  # nats by which a confidence may miss its limit by rounding, see tests/scoring/test_selection.py


@pytest.mark.parametrize("options", SELECTED.values(), ids=SELECTED)
@torch.no_grad()
def test_o10_with_a_scored_selection(policy, spec, options, monkeypatch):
    """Decoding knows what it could have unmasked; scoring finds it from the log. Edits are not part of the selection."""
    spec = can_edit(spec)
    temperature = options.get("temperature", 1.0)
    batch = rollout(policy, spec, **options, score_selection=True)
    without = rollout(policy, spec, **options)
    recorded = torch.cat([batch.logps, batch.revisions.logps], 1)
    plain = torch.cat([without.logps, without.revisions.logps], 1)
    assert torch.equal(batch.revisions.tokens, without.revisions.tokens)
    assert_close(plain, replayed_logps(policy, spec, batch, temperature).float())
    if spec.block_size > 1:
        assert (recorded < plain - 0.1).any()
    selection = DecodingConfig(score_selection=True, **{**options, "temperature": temperature}).selection
    exactly = Selection.rejected_logps
    for config in (EstimatorConfig("exact", selection=selection), EstimatorConfig(num_draws=2, selection=selection)):
        bounds = []
        for shift in (-EDGE, EDGE):
            monkeypatch.setattr(
                Selection,
                "rejected_logps",
                lambda self, logps, seen, lowest, shift=shift: exactly(self, logps, seen - shift, lowest),
            )
            logps, weights = packed(policy, spec, batch, config, None, temperature)
            bounds.append(logps)
        low, high = bounds
        scored = weights > 0
        assert_close(recorded[scored], recorded[scored].clamp(low[scored], high[scored]))
        assert (high - low)[scored].gt(ROUNDING).float().mean() < 0.1


# ---------------------------------------------------------------------------------------------------------- O11


def once_written(rng: random.Random, spec) -> TrajectoryBatch:
    """A log in which every position is written once, all of them count, and steps are counted over the whole response."""
    batch = random_batch(rng, spec)
    prompts = [prompt_of(batch, row) for row in range(len(batch))]
    logs = []
    for row, length in enumerate(batch.canvas_lengths.tolist()):
        log, step, block = [], 0, 0
        size, tail = spec.block_size, len(prompts[row]) % spec.block_size if spec.block_origin == "sequence" else 0
        for start in range(-tail, length, size):
            order = [position for position in range(start, start + size) if position >= 0]
            first = is_autoregressive(spec, len(prompts[row]), order[0])
            rest = order[first:]
            rng.shuffle(rest)
            step = step if spec.attention == "full" else 0
            for position in order[:first]:
                log.append((step, position, rng.randint(6, 38)))
                step += 1
            while rest:
                number = rng.randint(1, len(rest))
                log += [(step, position, rng.randint(6, 38)) for position in rest[:number]]
                rest, step = rest[number:], step + 1
            block += 1
        logs.append(log)
    lengths = batch.canvas_lengths.tolist()
    return batch_of(rng, spec, prompts, logs, lengths, lengths)


def blockwise(spec, batch: TrajectoryBatch) -> torch.Tensor:
    """Steps counted inside each block, as they are without revisions."""
    if spec.attention == "block":
        return batch.steps
    steps, blocks = batch.steps.clone(), torch.arange(batch.steps.shape[1]) // spec.block_size
    for row, block in itertools.product(range(len(steps)), range(int(blocks.max()) + 1)):
        own = (blocks == block) & (steps[row] >= 0)
        if own.any():
            steps[row, own] -= steps[row, own].min().clone()
    return steps


ESTIMATES = [
    EstimatorConfig("exact"),
    EstimatorConfig("elbo", num_draws=2),
    EstimatorConfig("mean_field"),
    EstimatorConfig("coupled"),
    EstimatorConfig(step_distribution="uniform", weighting="none"),
    *(EstimatorConfig(step_distribution=name, num_draws=k) for name in ("uniform", "token", "importance") for k in (1, 3)),
    EstimatorConfig(num_blocks=1),
]  # fmt: skip


@given(
    name=st.sampled_from(sorted(KINDS)),
    config=st.sampled_from(ESTIMATES),
    seed=st.integers(0, 10**6),
    padding=st.integers(0, 2),
)
@settings(max_examples=80, **PROPERTY)
@torch.no_grad()
def test_o11_without_a_token_taken_back_everything_is_as_before(name, config, seed, padding):
    """States, draws, scores and weights of every estimator, to the bit."""
    spec, policy, rng = KINDS[name], POLICIES[name], random.Random(seed)
    batch = once_written(rng, spec)
    width = batch.steps.shape[1]
    plain = replace(batch, revisions=None, steps=blockwise(spec, batch))
    batch = replace(batch, revisions=Revisions.none(len(batch)).widen(padding))
    assert ((batch.steps >= 0).sum(1) == batch.canvas_lengths).all()
    seeds = [seed + row for row in range(len(batch))]
    if spec.attention == "full":
        config = replace(config, num_blocks=None)
    old, new = (ESTIMATORS[config.name].states(one, spec, seeds, config) for one in (plain, batch))
    assert torch.equal(new.hidden, old.hidden)
    shown = batch.canvas_ids[:, None].expand_as(new.hidden)
    assert new.shown is None or torch.equal(new.shown[~new.hidden], shown[~new.hidden])
    assert torch.equal(new.coefficients[..., :width], old.coefficients) and not new.coefficients[..., width:].any()
    assert torch.equal(new.weights[:, :width], old.weights) and not new.weights[:, width:].any()
    logps, weights = packed(policy, spec, batch, config, seeds)
    expected, _ = packed(policy, spec, plain, config, seeds)
    assert torch.equal(logps[:, :width], expected) and not logps[:, width:].any()
    assert torch.equal((logps * weights)[:, :width].sum(1), (expected * old.weights).sum(1))


# ---------------------------------------------------------------------------------------------------------- O12


@pytest.mark.parametrize("distribution", ["uniform", "token", "importance"])
@pytest.mark.parametrize("num_draws", [1, 2])
@torch.no_grad()
def test_o12_the_average_over_all_draws_is_the_exact_log_ratio(distribution, num_draws):
    """
    Every set of steps that a region can draw, with its probability from the log, the weights of the package and its packed
    scores under two policies: their weighted mean is the log-ratio of a replay.
    """
    repeats, checked = 400, 0
    for name, seed in itertools.product(KINDS, range(2)):
        spec, policy = KINDS[name], POLICIES[name]
        reference = another(policy)
        batch = random_batch(random.Random(seed), spec, rows=1, longest_prompt=3, most_blocks=2)
        exact = (replayed_logps(policy, spec, batch) - replayed_logps(reference, spec, batch)).sum().item()
        every = EstimatorConfig("exact")
        ratios = (packed(policy, spec, batch, every)[0] - packed(reference, spec, batch, every)[0])[0].double()
        config = EstimatorConfig(step_distribution=distribution, num_draws=num_draws)
        copies = batch.select(torch.zeros(repeats, dtype=torch.long))
        weights = ESTIMATORS["dtrpo"].states(copies, spec, list(range(repeats)), config).weights.double()
        drawable, always = drawable_writes(spec, batch, 0)
        expected = sum(ratios[column].item() for columns in always.values() for column in columns)
        for steps in drawable.values():
            sizes = {step: Fraction(size) for step, size in sizes_of(batch, 0, steps, distribution).items()}
            columns = [column for own in steps.values() for column in own]
            seen = {}
            for row in weights:
                drawn = tuple(sorted(step for step, own in steps.items() if row[own[0]] > 0))
                seen[drawn] = (row[columns] * ratios[columns]).sum().item()
            outcomes = possible_sets(sizes, distribution, num_draws) if len(sizes) <= 6 else {}
            if set(seen) != {outcome for outcome, chance in outcomes.items() if chance > 0}:
                break  # too many of them, or some that are too rare to be drawn here
            expected += sum(chance * seen[outcome] for outcome, chance in outcomes.items())
        else:
            assert expected == pytest.approx(exact, abs=1e-4, rel=1e-5)
            checked += 1
    assert checked >= 6


def expected_weights(spec, batch, row, config: EstimatorConfig) -> dict[int, float]:
    """One over the probability with which each write is scored, by column."""
    drawable, always = drawable_writes(spec, batch, row)
    number = len({*drawable, *always})
    factor = number / min(config.num_blocks or number, number)
    found = {column: factor for columns in always.values() for column in columns}
    for steps in drawable.values():
        inverse = inverse_chances(sizes_of(batch, row, steps, config.step_distribution), config.num_draws)
        found |= {column: factor * inverse[step] for step, columns in steps.items() for column in columns}
    return found


@pytest.mark.parametrize("name", ["shift-autoregressive-first", "block-from-response", "full"])
@torch.no_grad()
def test_o12_every_write_weighs_one_on_average(name):
    """With any distribution, any number of draws, and blocks that are left out."""
    spec, repeats = KINDS[name], 500
    batch = random_batch(random.Random(1), spec, rows=2)
    rows = torch.arange(len(batch)).repeat_interleave(repeats)
    copies = batch.select(rows)
    subsets = [None] if spec.attention == "full" else [None, 1]
    for distribution, num_draws, num_blocks in itertools.product(("uniform", "token", "importance"), (1, 3), subsets):
        config = EstimatorConfig(step_distribution=distribution, num_draws=num_draws, num_blocks=num_blocks)
        states = ESTIMATORS["dtrpo"].states(copies, spec, list(range(len(rows))), config)
        weights = states.weights.unflatten(0, (len(batch), repeats)).double()
        for row in range(len(batch)):
            for column, weight in expected_weights(spec, batch, row, config).items():
                error = abs(weights[row, :, column].mean().item() - 1)
                assert (
                    error <= 5 * ((weight - 1) / repeats) ** 0.5 + 1e-6
                )  # it is `weight` with probability 1 / weight, or 0
        assert not weights.sum(1)[~written(batch)].any()


# ------------------------------------------------------------------------------------------------------ O6 and O7


@pytest.mark.parametrize("name", KINDS)
def test_o6_gradients_are_those_of_a_replay(name):
    spec = KINDS[name]
    policy = make_policy(spec, **TINY)
    batch = random_batch(random.Random(3), spec)
    signs = torch.where(torch.arange(written(batch).shape[1]) % 3 == 0, -0.5, 1.0)
    gradients = []
    for logps in (packed(policy, spec, batch, EstimatorConfig("exact"))[0], replayed_logps(policy, spec, batch)):
        policy.zero_grad()
        (logps * signs).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert_close_gradients(*gradients)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_o7_padding_neighbours_and_the_order_of_writes_change_nothing(name):
    spec, policy = KINDS[name], POLICIES[name]
    batch = random_batch(random.Random(4), spec, rows=4)
    config, seeds = EstimatorConfig(num_draws=2), [11, 12, 13, 14]

    def totals(batch, seeds):
        logps, weights = packed(policy, spec, batch, config, seeds)
        return (logps * weights).sum(1)

    expected = totals(batch, seeds)
    assert expected.abs().min() > 0.1
    order = torch.tensor([2, 0, 3, 1])
    assert_close(totals(batch.select(order), [seeds[row] for row in order]), expected[order])
    for row, seed in enumerate(seeds):
        assert_close(totals(batch.select(torch.tensor([row])), [seed]), expected[row : row + 1])
    shuffled = torch.randperm(batch.revisions.steps.shape[1], generator=torch.Generator().manual_seed(0))
    other = replace(batch, revisions=batch.revisions.map(lambda values: values[:, shuffled]).widen(len(shuffled) + 3))
    assert_close(totals(other, seeds), expected)
    wide = replace(
        batch,
        **{name: torch.nn.functional.pad(getattr(batch, name), (0, 5), value=-1 if name == "steps" else 0)
           for name in ("canvas_ids", "steps", "logps")},
    )  # fmt: skip
    assert_close(totals(wide, seeds), expected)
    parts = [batch.select(slice(0, 1)), batch.select(slice(1, 4))]
    assert_close(totals(TrajectoryBatch.concatenate(parts), seeds), expected)


@torch.no_grad()
def test_other_estimators_look_at_the_final_text():
    """Whatever was taken back: the same scores as of a log that writes this text at once."""
    for name, config in itertools.product(KINDS, (EstimatorConfig("elbo", num_draws=2), *ESTIMATES[2:4])):
        spec, policy = KINDS[name], POLICIES[name]
        batch = random_batch(random.Random(5), spec)
        width = batch.steps.shape[1]
        logps, weights = packed(policy, spec, batch, config)
        plain = replace(batch, revisions=None)
        expected, own = packed(policy, spec, plain, config)
        assert torch.equal(weights[:, :width], own) and not weights[:, width:].any()
        assert torch.equal(logps[:, :width], expected) and not logps[:, width:].any()
        visible = (batch.steps >= 0) & batch.completion_mask
        assert torch.equal(own > 0, visible) or config.name == "elbo"


def test_masked_positions_are_never_scored():
    """A batch may hold nothing that was written, and no completion."""
    spec = KINDS["full"]
    batch = batch_of(random.Random(0), spec, [[7, 8], [9]], [[], [(0, 1, 7), (1, 1, None)]], [4, 4], [4, 4])
    logps, weights = packed(POLICIES["full"], spec, batch, EstimatorConfig())
    assert not weights[0].any() and weights[1].tolist() == [0, 0, 0, 0, 1]
    assert logps[1, 4] < 0 and batch.canvas_ids.eq(MASK).all()
    without = replace(batch, completion_lengths=torch.zeros(2, dtype=torch.long))
    assert not packed(POLICIES["full"], spec, without, EstimatorConfig("exact"))[1].any()
