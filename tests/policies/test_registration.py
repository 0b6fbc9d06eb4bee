"""`import trl_diffusion` is light, and the families are known to the auto classes all the same."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.processes import HANGS
from trl_diffusion import __version__
from trl_diffusion.policies import registration


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
modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in ("transformers", "trl_diffusion")]
assert not any(type(module.__spec__.loader).__module__.startswith("trl_diffusion") for module in modules if module.__spec__)
assert seen, "another finder was passed over"
"""
# A finder of somebody else, which was there first.
WATCHER = """
import sys
seen = []
class Watcher:
    def find_spec(self, name, path, target=None):
        if name.startswith("transformers.models.auto"):
            seen.append(name)
sys.meta_path.insert(0, Watcher())
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["Qwen3ForCausalLM", "AutoConfig; AutoConfig.for_model('llada')"])
def test_families_are_registered_whatever_is_imported_first(first):
    """While a model is imported, the auto classes are there before the backbones that the families are built on; the configs'
    auto class may be all that is imported."""
    code = f"{WATCHER}{LIGHT}from transformers import {first}{KNOWN}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS)
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_registration_that_fails_is_tried_again(monkeypatch):
    finder = registration._Finder()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    tries = []

    def fail_once(*_):
        tries.append(1)
        if len(tries) == 1:
            raise MemoryError("just now")

    monkeypatch.setattr(registration, "import_module", fail_once)
    with pytest.raises(MemoryError):
        finder.finish("transformers")
    assert finder in sys.meta_path
    finder.finish("transformers")
    assert len(tries) == 2 and finder not in sys.meta_path


def test_import_is_without_warnings():
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIGHT], capture_output=True, text=True, timeout=HANGS
    )
    assert (result.returncode, result.stderr) == (0, "")
    command = [sys.executable, "-W", "error", "-m", "trl_diffusion", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert (result.returncode, result.stderr) == (0, "") and __version__ in result.stdout


def test_transformers_first():
    """In this process transformers has long been imported."""
    from transformers import AutoConfig

    registration.register_families()
    assert not any("trl_diffusion" in type(finder).__module__ for finder in sys.meta_path)
    assert type(AutoConfig.for_model("sdar")).__name__ == "SDARConfig"
