"""`import trl_diffusion` is light, and the families are known to the auto classes all the same."""

from __future__ import annotations

import subprocess
import sys

import pytest


LIGHT = """
import sys
import trl_diffusion
heavy = sorted({"torch", "transformers", "trl", "numpy"} & set(sys.modules))
assert not heavy, heavy
"""
KNOWN = """
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
for model_type in ("llada", "Dream", "Fast_dLLM_Qwen", "sdar"):
    config = AutoConfig.for_model(model_type)
    assert type(config).__module__ == "trl_diffusion.policies.families.configs", config
    assert AutoModelForCausalLM._model_mapping[type(config)].__module__ == "trl_diffusion.policies.families.models"
assert any(config.model_type == "Dream" for config in TOKENIZER_MAPPING.keys())
assert not any("trl_diffusion" in type(finder).__module__ for finder in sys.meta_path)
"""


@pytest.mark.slow
def test_families_are_registered_whatever_is_imported_first():
    """While a model is imported, the auto classes are there before the backbones that the families are built on."""
    code = f"{LIGHT}from transformers import Qwen3ForCausalLM{KNOWN}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]


def test_import_is_without_warnings():
    result = subprocess.run([sys.executable, "-W", "error", "-c", LIGHT], capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stderr) == (0, "")


def test_transformers_first():
    """In this process transformers has long been imported."""
    from transformers import AutoConfig

    from trl_diffusion.policies.registration import register_families

    register_families()
    assert not any("trl_diffusion" in type(finder).__module__ for finder in sys.meta_path)
    assert type(AutoConfig.for_model("sdar")).__name__ == "SDARConfig"
