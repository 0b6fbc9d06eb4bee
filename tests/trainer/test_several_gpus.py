"""One process with several GPUs is refused before anything is loaded."""

from __future__ import annotations

import pytest

from trl_diffusion import DTRPOConfig


@pytest.mark.parametrize("seen", [0, 1, 2])
def test_transformers_may_not_split_packed_rows(make_trainer, monkeypatch, seen):
    monkeypatch.setattr(DTRPOConfig, "n_gpu", seen)  # what transformers finds when there is no launcher
    if seen < 2:
        assert make_trainer(max_steps=1).args.n_gpu == seen
        return
    with pytest.raises(ValueError, match="sees 2 GPUs.*accelerate launch.*CUDA_VISIBLE_DEVICES=0"):
        make_trainer("there is no model here")
