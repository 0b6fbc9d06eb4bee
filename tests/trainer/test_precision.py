"""What is computed in bfloat16, and when."""

from __future__ import annotations

import pytest
import torch

from tests.closeness import assert_close
from trl_diffusion import DTRPOConfig


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
        scores.append((logps, layout.targets, layout.responses, layout.event_columns))
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


@pytest.mark.parametrize(("gpu", "options", "expected"), [
    (True, {}, True), (True, {"fp16": True}, False), (True, {"use_cpu": True}, False), (True, {"bf16": False}, False),
    (False, {}, False), (False, {"use_cpu": True, "bf16": True}, True),
])  # fmt: skip
def test_bfloat16_is_the_default_where_a_gpu_has_it(tmp_path, monkeypatch, gpu, options, expected):
    for module in ("trl_diffusion.trainer.options", "transformers.training_args"):
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: gpu)
    assert DTRPOConfig(str(tmp_path), **options).bf16 is expected
