"""Training with a decoder that takes tokens back: online and offline, group losses and pairs, references, and resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset

from tests.closeness import ROUNDING, assert_close, assert_close_gradients, close_to
from tests.conftest import disturb, make_policy
from tests.events import events_of, moments, replayed_logps
from tests.offline.conftest import run_collect
from tests.scoring.test_revision import check_draw
from tests.trainer.conftest import make_dataset, per_row_inputs, record, slice_rows
from trl_diffusion import DecodingConfig, load_trajectories
from trl_diffusion.scoring.estimators import EstimatorConfig
from trl_diffusion.trainer.batches import trajectories_of


WAYS = {
    "erasing": {"revision": "confidence", "revision_threshold": 0.05, "tokens_per_step": 2, "revision_max": 2},
    "editing": {"revision": "edit", "edit_threshold": 0.2, "steps_per_block": 5, "revision_limit": 3, "tokens_per_step": 1},
}  # fmt: skip
KINDS = {
    "block": {},
    "full": {"attention": "full", "block_origin": "response"},
    "clean-causal": {"clean_attention": "causal"},
}


@pytest.fixture(scope="session", params=KINDS)
def policies(request, tmp_path_factory, tokenizer, char_spec) -> tuple[str, str]:
    """Two policies on disk."""
    spec = char_spec.replace(predicts_visible_tokens=True, **KINDS[request.param])
    found = []
    for seed in (0, 7):
        found.append(tmp_path_factory.mktemp(f"revising-{request.param}-{seed}"))
        policy = make_policy(
            spec, seed=seed, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_hidden_layers=3
        )
        policy.save_pretrained(found[-1])
        tokenizer.save_pretrained(found[-1])
    return str(found[0]), str(found[1])


@pytest.fixture(params=WAYS)
def way(request) -> dict:
    return WAYS[request.param]


@pytest.fixture
def ready(make_trainer, policies):
    """A trainer with one batch of 8 responses, and a policy that has moved away from them and from the reference."""

    def build(**options):
        trainer = make_trainer(policies[0], per_device_train_batch_size=8, beta=0.05, **options)
        inputs = per_row_inputs(trainer)
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
        disturb(trainer.model)
        assert (inputs["revised_steps"] >= 0).any()
        return trainer, inputs

    return build


def loss_and_gradient(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def replayed(trainer, batch):
    """Log-probabilities of every write under the policy, with a graph, and under the reference, from the event log."""
    with torch.no_grad():
        reference = replayed_logps(trainer.ref_model, trainer.spec, batch)
    return replayed_logps(trainer.model, trainer.spec, batch), reference


@pytest.mark.parametrize("estimator", ["exact", "dtrpo"])
def test_the_loss_is_that_of_the_event_log(ready, way, estimator):
    """Every write is an action: clipped ratio to what was recorded, advantage, KL to the reference, weight of the draw."""
    trainer, inputs = ready(estimator=estimator, loss_type="dapo", **way)
    batch = trajectories_of(inputs)
    with trainer.scoring(inputs) as scored:
        weights = scored.layout.weights.clone()
    written = torch.cat([batch.steps, batch.revisions.steps], 1) >= 0
    assert inputs["num_items_in_batch"] == written.sum()
    if estimator == "exact":
        assert torch.equal(weights, written.float())
    else:
        for row in range(len(batch)):
            check_draw(trainer.spec, batch, row, weights[row].tolist(), EstimatorConfig())
    logps, reference = replayed(trainer, batch)
    recorded = torch.cat([batch.logps, batch.revisions.logps], 1)
    ratio, advantages = (logps - recorded).exp(), inputs["advantages"][:, None]
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    kl = (reference - logps).exp() - (reference - logps) - 1
    expected = ((losses + 0.05 * kl * ratio) * weights).sum() / written.sum()  # use_bias_correction_kl
    trainer.model.zero_grad()
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    loss, found = loss_and_gradient(trainer, inputs)
    assert loss.item() == close_to(expected.item())
    assert_close_gradients(found, gradient)


def test_pairs_are_compared_by_all_that_was_written(ready, way):
    """The pairwise loss of the best and the worst response of each group."""
    trainer, inputs = ready(estimator="exact", loss_type="dpo", dpo_loss_type=["sigmoid"], **way)
    batch = trajectories_of(inputs)
    logps, reference = replayed(trainer, batch)
    ratios = (logps - reference).sum(1)
    scores, losses = inputs["pair_scores"].view(2, 4), []
    for group in range(2):
        best, worst = (4 * group + int(place) for place in (scores[group].argmax(), scores[group].argmin()))
        losses.append(-torch.nn.functional.logsigmoid(0.05 * (ratios[best] - ratios[worst])))
    expected = torch.stack(losses).mean()
    trainer.model.zero_grad()
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    loss, found = loss_and_gradient(trainer, inputs)
    assert loss.item() == close_to(expected.item())
    assert_close_gradients(found, gradient)


def test_the_loss_does_not_depend_on_how_the_batch_is_cut(ready):
    """Two batches of 4 accumulated, rows in another order, rows alone: the same loss and gradient."""
    trainer, inputs = ready(loss_type="dapo", num_draws=2, **WAYS["erasing"])

    def run(parts):
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = len(parts)
        found = [loss_and_gradient(trainer, part) for part in parts]
        return sum(loss.item() for loss, _ in found), sum(gradient for _, gradient in found)

    whole, gradient = run([inputs])
    rows = torch.tensor([5, 0, 3, 6, 1, 7, 2, 4])
    for parts in (
        [slice_rows(inputs, rows)],
        [slice_rows(inputs, slice(0, 4)), slice_rows(inputs, slice(4, 8))],
        [slice_rows(inputs, [row]) for row in rows.tolist()],
    ):
        total, other = run(parts)
        assert total == close_to(whole)
        assert_close_gradients(other, gradient)


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_online_training(make_trainer, policies, way):
    """The rollout's own scores are those that the next pass finds, and the figures are those of the event log."""
    trainer = make_trainer(
        policies[0],
        per_device_train_batch_size=8,
        beta=0.05,
        max_steps=3,
        estimator_check_steps=1,
        estimator_check_size=2,
        **way,
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    logs = logs_of(trainer)
    assert len(logs) == 3 and all(entry["diffusion/taken_back"] > 0 for entry in logs)
    assert all(entry["diffusion/recorded_gap/max"] < ROUNDING for entry in logs)
    assert all(abs(entry["diffusion/check/log_ratio"]) >= 0 for entry in logs)
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    batch = trainer.last_rollouts
    events = [events_of(trainer.spec, batch, row) for row in range(len(batch))]
    steps = [sum(any(event.token is not None for event in here) for here in moments(log).values()) for log in events]
    gone = sum(int((batch.revisions.steps[row] >= 0).sum()) for row in range(len(batch)))
    assert logs[-1]["diffusion/taken_back"] == pytest.approx(gone / len(batch))
    assert logs[-1]["diffusion/steps_per_response"] == pytest.approx(sum(steps) / len(batch))
    assert logs[-1]["diffusion/tokens_per_step"] == pytest.approx(int(batch.completion_lengths.sum()) / sum(steps))


# ------------------------------------------------------------------------------------------------------------- offline


@pytest.fixture(scope="session")
def stored(policies, tmp_path_factory, tokenizer):
    """A collection of responses of the first policy."""
    directory = tmp_path_factory.mktemp("revised") / "run"
    decoding = DecodingConfig(14, 1.0, **WAYS["erasing"])
    return load_trajectories(run_collect(policies[0], directory, tokenizer, decoding=decoding))


OFFLINE = {"reward_funcs": None, "optim": "sgd", **WAYS["erasing"]}


@pytest.mark.parametrize("loss_type", ["dapo", "dpo"])
def test_offline_training(make_trainer, policies, stored, loss_type, monkeypatch):
    """Recorded scores are those of the old policy and of the reference: no pass without a gradient, and the same losses as with
    the reference's own passes."""
    options = {
        **OFFLINE, "dataset": stored.select(range(6)), "loss_type": loss_type, "beta": 0.1, "max_steps": 3,
        "kwargs": {"eval_dataset": stored.select(range(6, 10))}, "per_device_eval_batch_size": 4,
    }  # fmt: skip
    recorded, counts = make_trainer(policies[0], **options), {True: 0, False: 0}
    assert recorded.ref_model is None

    def count(module, args):
        counts[torch.is_grad_enabled()] += 1

    recorded.model.register_forward_pre_hook(count)
    recorded.train()
    assert counts == {True: 3, False: 0}
    logs = logs_of(recorded)
    assert logs[0]["diffusion/recorded_gap/max"] < ROUNDING and logs[0]["kl"] < 1e-6 < logs[-1]["kl"]
    assert logs[0]["diffusion/taken_back"] > 0
    evaluation = recorded.evaluate()
    monkeypatch.setattr("trl_diffusion.trainer.data.fingerprint_policy", lambda *args, **kwargs: "somebody else")
    scored = make_trainer(policies[0], **options)
    assert scored.ref_model is not None
    scored.train()
    for name in ("eval_loss", "eval_kl", "eval_diffusion/taken_back"):
        assert evaluation[name] == close_to(scored.evaluate()[name])
    for a, b in zip(logs, logs_of(scored), strict=True):
        assert a["loss"] == close_to(b["loss"]) and a["kl"] == close_to(b["kl"])


@pytest.mark.parametrize("loss_type", ["dapo", "dpo"])
def test_a_precomputed_reference(make_trainer, policies, stored, loss_type):
    """Rows have different numbers of writes, and are put together in other batches than those of the passes before training."""
    options = {
        **OFFLINE, "dataset": stored.select(range(6)), "loss_type": loss_type, "beta": 0.1, "max_steps": 5,
        "per_device_train_batch_size": 8, "num_iterations": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    plain, early = (make_trainer(policies[1], precompute_ref_log_probs=value, **options) for value in (False, True))
    plain.train()
    early.train()
    assert early.ref_model is None
    for name in ("loss", "kl"):
        assert [entry[name] for entry in logs_of(plain)] == close_to([entry[name] for entry in logs_of(early)])
    assert logs_of(early)[0]["kl"] < 1e-6 < logs_of(early)[-1]["kl"]
    widths = {estimates.shape[-1] - width for estimates, width in early.reference.estimates.values()}
    assert len(widths) > 1


def test_stored_settings_and_those_of_the_run(make_trainer, policies, stored):
    """What was taken back is in the data: a run needs no setting for it."""
    options = {**OFFLINE, "dataset": stored, "max_steps": 1}
    same = {name: value for name, value in options.items() if not name.startswith("revision")}
    losses = []
    for one in (options, same):
        trainer = make_trainer(policies[0], **one)
        trainer.train()
        losses.append(logs_of(trainer)[0]["loss"])
    assert losses[0] == losses[1]


def test_a_damaged_row_is_refused(make_trainer, policies, stored, char_spec, tmp_path):
    rows = copy.deepcopy(stored.to_list())
    erasures = [
        (response, place)
        for response, tokens in enumerate(rows[2]["event_tokens"])
        for place, token in enumerate(tokens)
        if token == char_spec.mask_token_id
    ]
    response, place = erasures[0]
    position = rows[2]["event_positions"][response][place]
    first = rows[2]["event_positions"][response].index(position)
    for name in ("event_steps", "event_positions", "event_tokens", "event_logps"):
        rows[2][name][response].pop(first)
    with pytest.raises(ValueError, match=rf"train_dataset.*Row 2, column `event_.*`, response {response}: ") as error:
        make_trainer(
            policies[0], **{**OFFLINE, "dataset": Dataset.from_list(rows), "output_dir": str(tmp_path / "out")}
        )
    assert "erases position" in str(error.value) or "count from 0" in str(error.value)


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("source", ["online", "offline"])
def test_resuming_in_the_middle_of_a_rollout(make_trainer, policies, stored, tmp_path, source):
    """The same draws, losses and weights as without an interruption, to the bit."""
    options = {
        **OFFLINE, "per_device_train_batch_size": 8, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 6,
        "save_strategy": "steps", "save_steps": 3, "beta": 0.05, "output_dir": str(tmp_path), "dataset": stored.select(range(6)),
    }  # fmt: skip
    if source == "online":
        options |= {"dataset": make_dataset(6)}
        del options["reward_funcs"]
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        trainer = make_trainer(policies[0], **options)
        draws = record(trainer)
        torch.manual_seed(7 + len(runs))  # another process has another random state
        trainer.train(resume_from_checkpoint=resume)
        runs.append((trainer, draws))
    (whole, draws), (part, resumed) = runs
    assert [entry["loss"] for entry in logs_of(whole)] == [entry["loss"] for entry in logs_of(part)]
    assert 0 < len(resumed) < len(draws) and draws[0][2].shape[1] > draws[0][0].shape[1]
    for expected, found in zip(draws[-len(resumed) :], resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    for expected, found in zip(whole.model.parameters(), part.model.parameters(), strict=True):
        assert torch.equal(expected, found)
    rollouts = [trainer.last_rollouts for trainer in (whole, part)]
    assert_close(rollouts[0].revisions.logps, rollouts[1].revisions.logps)
    assert torch.equal(rollouts[0].revisions.tokens, rollouts[1].revisions.tokens)
