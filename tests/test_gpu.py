"""On a CUDA device: what is computed there is what the CPU computes, whatever the kernels are."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tests.conftest import SPECS, make_policy, make_prompts
from tests.reference import DECODINGS, group_rollout, rollout, states_of
from tests.trainer.conftest import char_spec, make_trainer, tokenizer  # noqa: F401  (fixtures)
from trl_diffusion.decoding.decode import decode
from trl_diffusion.policies.attention import PackedMask, enable_plans
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score
from trl_diffusion.trainer.throughput import ThroughputCallback


DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("decoding", ["two-per-step", "greedy", "threshold"])
@pytest.mark.parametrize("name", SPECS)
def test_decoding_gives_the_tokens_of_the_cpu(name, decoding):
    policy = make_policy(SPECS[name])
    expected = rollout(policy, DECODINGS[decoding])
    found = rollout(policy.to(DEVICE), DECODINGS[decoding])
    assert found.canvas_ids.device.type == DEVICE
    found = found.to("cpu")
    assert found.completions() == expected.completions()
    assert torch.equal(found.steps, expected.steps)
    torch.testing.assert_close(found.logps, expected.logps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("estimator", ["exact", "dtrpo", "elbo", "coupled", "mean_field"])
@pytest.mark.parametrize("name", SPECS)
def test_scores_and_gradients_are_those_of_the_cpu(name, estimator):
    """Of the same trajectories and draws; `exact` and `dtrpo` also give what was recorded while decoding."""
    spec = SPECS[name]
    policy = make_policy(spec)
    batch = rollout(policy, DECODINGS["two-per-step"])
    config = EstimatorConfig(estimator)
    results = []
    for device in ("cpu", DEVICE):
        model, here = copy.deepcopy(policy).to(device), batch.to(device)
        states = states_of(here, spec, config)
        logps, entropies = score(
            model, pack(here, spec, states, ESTIMATORS[estimator].one_row), spec, compute_entropy=True
        )
        (logps * states.weights).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append([values.detach().cpu() for values in (logps, entropies, gradient, states.weights)])
    for found, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    if ESTIMATORS[estimator].recorded:
        scored = results[1][3] > 0
        torch.testing.assert_close(results[1][0][scored], batch.logps[scored], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", ["block-from-sequence", "shift-autoregressive-first", "clean-causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_is_as_accurate_as_sdpa(dtype, name, share):
    """Log-probabilities and gradients, by the compiled kernels: both against SDPA in float32."""
    spec = SPECS[name]
    policy = make_policy(spec, hidden_size=64, head_dim=16, max_position_embeddings=256).to(DEVICE)
    batch = group_rollout(policy, lengths=(93, 120, 61))
    layout = pack(batch, spec, states_of(batch, spec, EstimatorConfig(num_draws=3)), True, share)

    def outcome(implementation, precision):
        model = copy.deepcopy(policy).to(precision)
        model.set_attn_implementation(implementation)
        enable_plans(model)
        logps, _ = score(model, layout, spec)
        (logps * layout.weights).sum().backward()
        return logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    reference = outcome("sdpa", torch.float32)
    results = zip(outcome("sdpa", dtype), outcome("flex_attention", dtype), reference, strict=True)
    for sdpa, flex, expected in results:
        allowed = max(3 * relative_error(sdpa, expected), 1e-4)
        assert relative_error(flex, expected) <= allowed < 0.5


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_a_trainer_steps(make_trainer, char_spec, tokenizer, implementation, gradient_checkpointing):  # noqa: F811
    """In float32 what was recorded is what is scored; under autocast nearly so."""
    for bf16, allowed in ((False, 1e-3), (True, 0.5)):
        policy = make_policy(char_spec, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, head_dim=16)
        policy.set_attn_implementation(implementation)
        enable_plans(policy)
        trainer = make_trainer(policy, bf16=bf16, gradient_checkpointing=gradient_checkpointing, max_steps=2)
        assert trainer.accelerator.device.type == DEVICE
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
        assert len(rows) == 2 and all(math.isfinite(row["loss"]) for row in rows)
        assert rows[0]["diffusion/recorded_gap/max"] <= allowed
        assert rows[0]["memory/peak_gib"] > 0


def test_an_answer_does_not_depend_on_its_neighbours():
    policy = make_policy(SPECS["block-from-sequence"]).to(DEVICE)
    prompts = make_prompts()
    seeds = list(range(len(prompts)))
    together, alone = (
        decode(policy, prompts, DECODINGS["two-per-step"], seeds=seeds, batch_size=n) for n in (None, 1)
    )
    assert together.completions() == alone.completions()


def test_the_clock_of_an_update_waits_for_the_device(make_trainer):  # noqa: F811
    """Kernels that are still running at the end of a step are a part of it."""
    trainer = make_trainer(max_steps=1)
    trainer.model.train()
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ThroughputCallback))
    callback.on_step_begin(None, None, None)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(10**9)
    end.record()
    callback.on_step_end(None, None, None)
    end.synchronize()
    seconds = begin.elapsed_time(end) / 1000
    assert trainer._metrics["train"]["time/update"][-1] >= 0.9 * seconds


def test_rows_of_a_bucket_share_a_kernel():
    """Whether something is added to a row to fill its bucket, or nothing: compiling takes seconds."""

    def run(length: int) -> None:
        states = [
            torch.randn(2, length, heads, 16, device=DEVICE).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)
        ]
        blocks = (torch.arange(length, device=DEVICE) // 8).expand(2, -1)
        valid = torch.ones(2, length, dtype=torch.bool, device=DEVICE)
        PackedMask(blocks, torch.zeros_like(blocks[0]), valid).attend_flex(None, *states).sum().backward()

    run(200)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(256)
        run(250)
