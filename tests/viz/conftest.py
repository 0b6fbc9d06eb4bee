"""A response to draw, and the figures that were drawn."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from tests.conftest import SPECS, make_policy, make_prompts
from trl_diffusion import DecodingConfig, decode, tiny_policy_path
from trl_diffusion.viz import plots


SPEC = SPECS["block-from-sequence"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_policy_path())


@pytest.fixture(scope="module")
def answer():
    return decode(make_policy(SPEC), make_prompts((3,)), DecodingConfig(20, tokens_per_step=2))


save = plots.save


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be written, which takes longer than to draw them."""
    figures = []

    def keep(figure, path):
        figures.append(figure)
        return path

    monkeypatch.setattr(plots, "save", keep)
    return figures
