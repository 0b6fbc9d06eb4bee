"""Comparisons that take seconds."""

import pytest

from trl_diffusion.experiments.settings import Sizes


@pytest.fixture
def sizes() -> Sizes:
    return Sizes(
        hidden_size=16, num_layers=2, corpus_size=48, pretrain_updates=5, pretrain_batch_size=16, updates=2, batch_size=8,
        num_generations=4, seconds=0.01, learning_rates=(1e-3,), eval_size=6, validation_size=4, num_samples=2,
    )  # fmt: skip
