"""
The package against the method on one page, recipes/dtrpo_loop.py, which shares no code with it: decoding, packed scores,
weights and their mean, and the loss of an update with its gradient.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import dtrpo_loop as loop
from tests.closeness import assert_close, assert_close_gradients
from tests.conftest import SPECS, STOP, make_policy, make_prompts, shared
from tests.reference import another, rollout
from tests.trainer.conftest import codes, make_dataset
from trl_diffusion import DecodingConfig, DTRPOConfig, DTRPOTrainer, decode, get_spec, set_spec, tiny_policy_path
from trl_diffusion.scoring.draws import StepDraw, draw_steps
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score
from trl_diffusion.scoring.states import drawn_states
from trl_diffusion.seeds import derive_seed
from trl_diffusion.trajectories.trajectory import NEVER, TrajectoryBatch, token_states


BLOCK_SPECS = ["block-from-sequence", "block-from-response", "shift-autoregressive-first", "block-of-one"]
FAMILIES = {"fast_dllm_v2": {"mask_token_id": 300, "block_size": 8}, "sdar": {}}
DECODINGS = {
    "two-per-step": DecodingConfig(max_new_tokens=24, temperature=1.0, tokens_per_step=2),
    "threshold": DecodingConfig(max_new_tokens=20, temperature=1.0, strategy="threshold", threshold=0.2),
    "stop-at-token": DecodingConfig(
        max_new_tokens=22, temperature=1.0, strategy="entropy_bound", entropy_bound=1.5, stop_rule="token"
    ),
}


@pytest.fixture(params=[*BLOCK_SPECS, *FAMILIES])
def named(request):
    """A policy with block attention and its spec. The page leaves the mask token out of the softmax, so these do, too."""
    if request.param in SPECS:
        return make_policy(SPECS[request.param]), SPECS[request.param]
    policy = AutoModelForCausalLM.from_pretrained(shared("fixtures", request.param)).eval()
    changes = {**FAMILIES[request.param], "stop_token_ids": (STOP,), "predicts_mask_token": False}
    set_spec(policy.config, get_spec(policy.config, changes))
    return policy, get_spec(policy.config)


def sequences(batch: TrajectoryBatch, prompt: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
    """Values of the prompt, `(R, P)`, without padding, and after them those of the canvas, `(R, C)`: `(R, P + C)`."""
    kept = batch.prompt_mask.bool()
    rows = [torch.cat([before[mask], after]) for before, mask, after in zip(prompt, kept, canvas, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def as_trajectories(batch: TrajectoryBatch, spec) -> tuple[loop.Trajectories, torch.Tensor]:
    """A batch of the package in the page's form, and the place of each canvas position in its sequence, `(R, C)`."""
    never = int(batch.steps.max()) + 1  # later than any step: a mask in every state
    steps = torch.where(batch.steps == NEVER, never, batch.steps)
    tokens = sequences(batch, batch.prompt_ids, batch.canvas_ids)
    blocks = loop.number_blocks(spec, batch.prompt_lengths, tokens.shape[1])
    nowhere = torch.zeros_like(batch.prompt_ids, dtype=torch.bool)
    completion = sequences(batch, nowhere, batch.completion_mask)
    counted = sequences(batch, nowhere, token_states(spec, batch).counted)
    trajectories = loop.Trajectories(
        tokens=tokens,
        blocks=blocks,
        steps=sequences(batch, torch.full_like(batch.prompt_ids, -1), steps),
        logps=sequences(batch, torch.zeros(batch.prompt_ids.shape), batch.logps),
        completion=completion,
        counted=counted,
        autoregressive=counted & (blocks != blocks.roll(1, 1)) & (spec.first_token == "autoregressive"),
    )
    return trajectories, batch.prompt_lengths[:, None] + torch.arange(batch.canvas_ids.shape[1])


def importance_draw(spec, batch: TrajectoryBatch, seeds: list[int]) -> StepDraw:
    return draw_steps(token_states(spec, batch), seeds, "importance", surprises=1 - batch.logps.exp())


def drawn_at_positions(steps: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """The package's draws, one step of each block, `(R, S, 1)`, as the page has them, `(R, P + C)`."""
    return steps.squeeze(2).gather(1, blocks.clamp(0, steps.shape[1] - 1))


@pytest.mark.parametrize("per_step", [1, 3])
def test_denoising_is_the_decoders(policy, spec, per_step):
    """Cached, ragged decoding takes the same steps as full passes over masked sequences, and records the same numbers."""
    prompts = make_prompts()
    decoding = DecodingConfig(max_new_tokens=3 * spec.block_size, temperature=0.0, tokens_per_step=per_step)
    batch = decode(policy, prompts, decoding)
    found = loop.denoise(policy, spec, prompts, 4, per_step, None)
    for row, prompt in enumerate(prompts):
        length = int(batch.completion_lengths[row])
        place = slice(len(prompt), len(prompt) + length)
        assert found.tokens[row, place].tolist() == batch.completions()[row]
        assert torch.equal(found.steps[row, place], batch.steps[row, :length])
        assert_close(found.logps[row, place], batch.logps[row, :length])
        assert found.completion[row, place].all()
        stopped = int(found.tokens[row, place][-1]) in spec.stop_token_ids
        assert int(found.completion[row].sum()) == length or not stopped
        if stopped:  # the page's blocks go on where those of the package end
            width = min(batch.canvas_ids.shape[1], found.tokens.shape[1] - len(prompt))
            canvas = slice(len(prompt), len(prompt) + width)
            assert torch.equal(found.counted[row, canvas], token_states(spec, batch).counted[row, :width])


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
def test_packed_scores_weights_and_gradients(policy, spec, decoding):
    """
    In the states of the same draw, `pack` and `score` find the log-probabilities of the page, `drawn_states` gives its
    weights, and the weighted sum has the same gradient.
    """
    batch = rollout(policy, decoding)
    trajectories, places = as_trajectories(batch, spec)
    moved = another(policy)
    for attempt in range(2):
        draw = importance_draw(spec, batch, [10 * attempt + row for row in range(len(batch))])
        states = drawn_states(batch, spec, draw)
        drawn = drawn_at_positions(draw.steps, trajectories.blocks)
        weights = loop.weigh(trajectories, drawn)
        assert_close(states.weights, weights.gather(1, places))
        assert_close(weights.sum(), states.weights.sum())

        found = score(moved, pack(batch, spec, states), spec)[0]
        wanted = loop.score(moved, spec, trajectories, drawn)
        scored = weights > 0
        assert_close(found[states.weights > 0], wanted[scored])
        gradients = []
        for total in ((found * states.weights).sum(), (wanted[scored] * weights[scored]).sum()):
            moved.zero_grad()
            total.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in moved.parameters() if p.grad is not None]))
        assert_close_gradients(*gradients)


@torch.no_grad()
def test_draws_are_unbiased(policy, spec):
    """The mean of the page's estimates over its draws is the whole log-ratio that the package's `exact` finds."""
    batch = rollout(policy, DECODINGS["threshold"])
    trajectories, _ = as_trajectories(batch, spec)
    layout = pack(
        batch, spec, ESTIMATORS["exact"].states(batch, spec, list(range(len(batch))), EstimatorConfig("exact"))
    )
    policies = (another(policy), policy)
    exact = torch.sub(*((score(p, layout, spec)[0] * layout.weights).sum(1) for p in policies))

    # The log-ratio of each token in its own state, from one pass for each step.
    ratios = torch.zeros_like(trajectories.logps)
    for step in range(int(trajectories.steps[trajectories.counted].max()) + 1):
        drawn = torch.full_like(trajectories.steps, step)
        here = trajectories.counted & ((trajectories.steps == step) | trajectories.autoregressive)
        ratio = torch.sub(*(loop.score(p, spec, trajectories, drawn) for p in policies))
        ratios = torch.where(here, ratio, ratios)
    assert_close(ratios.sum(1), exact)

    repeats = 2000
    many = loop.Trajectories(*(values.repeat(repeats, 1) for values in trajectories))
    weights = loop.weigh(many, loop.draw(many, torch.Generator().manual_seed(0))).unflatten(0, (repeats, -1))
    estimates = (weights * ratios).sum(2).double()  # (repeats, R)
    errors = (estimates.mean(0) - exact).abs()
    assert (errors <= 4.5 * estimates.std(0) / repeats**0.5 + 1e-4).all()


@pytest.mark.parametrize("name", BLOCK_SPECS)
def test_an_update_of_the_trainer(name, tmp_path):
    """From the trainer's rollouts and the seeds of its draws: its advantages, loss and gradient, off policy and clipped."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left")
    ids = {"mask_token_id": tokenizer.mask_token_id, "stop_token_ids": (tokenizer.eos_token_id,)}
    spec = SPECS[name].replace(**ids)
    model = make_policy(spec, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    args = DTRPOConfig(
        str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=14,
        tokens_per_step=2,
        loss_type="grpo",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    trainer = DTRPOTrainer(model, codes, args, make_dataset(), processing_class=tokenizer)
    trainer.model.train()
    rows = [trainer.train_dataset[row // 4] for row in range(8)]
    inputs = trainer._generate_and_score_completions(rows)
    batch = trainer.last_rollouts
    trajectories, _ = as_trajectories(batch, spec)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))

    advantages = loop.advantages_of(
        torch.tensor(codes(tokenizer.batch_decode(batch.completions(), skip_special_tokens=True))), 4
    )
    assert_close(inputs["advantages"].flatten(), advantages)

    seeds = [derive_seed(seed, 0) for seed in inputs["draw_seeds"].flatten().tolist()]
    drawn = drawn_at_positions(importance_draw(spec, batch, seeds).steps, trajectories.blocks)
    weights = loop.weigh(trajectories, drawn)
    logps = loop.score(model, spec, trajectories, drawn)
    ratios = (logps - trajectories.logps)[weights > 0].exp()
    assert (ratios > 1.2).any() and (ratios < 0.8).any()
    wanted = loop.grpo_loss(logps, trajectories.logps, weights, advantages, args.epsilon)

    trainer.current_gradient_accumulation_steps = 1
    found = trainer._compute_loss(trainer.model, inputs)
    assert_close(found, wanted)
    gradients = []
    for loss in (found, wanted):
        model.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[1].abs().max() > 1e-3
    assert_close_gradients(*gradients)
