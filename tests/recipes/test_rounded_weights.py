"""`generate` and `evaluate` open a policy with rounded weights, as training and collecting do."""

from __future__ import annotations

import pytest
from transformers import BitsAndBytesConfig

from trl_diffusion import tiny_policy_path
from trl_diffusion.commands import evaluate, generate
from trl_diffusion.policies import policy as opening
from trl_diffusion.policies.quantized import rounding


@pytest.fixture
def opened(monkeypatch):
    """With what the commands load a model; nothing is loaded."""
    found = []

    class Loaded(Exception):
        pass

    def load(path, device, quantization=None, **options):
        found.append((path, quantization, options))
        raise Loaded

    monkeypatch.setattr(opening, "load_model", load)
    return found, Loaded


def test_commands_pass_it_on(opened, tmp_path):
    found, loaded = opened
    for words, bits in (([], None), (["--load_in_8bit"], 8), (["--load_in_4bit", "--dtype", "bfloat16"], 4)):
        with pytest.raises(loaded):
            generate._answer(generate._parser().parse_args(["sudoku 1", *words]))
        (tmp_path / "sudoku").mkdir(exist_ok=True)
        (tmp_path / "sudoku" / "4x4_test.csv").write_text("Puzzle,Solution\n")
        with pytest.raises(loaded):
            evaluate.run(evaluate.parse(["--tasks", "sudoku", "--data_dir", str(tmp_path), *words]))
        for path, quantization, _ in found[-2:]:
            assert path == tiny_policy_path()
            assert quantization is None if bits is None else getattr(quantization, f"load_in_{bits}bit")
    assert len(found) == 6


def test_how_weights_are_rounded():
    assert rounding(False, False, "bfloat16") is None
    four = rounding(True, False, "auto")
    assert isinstance(four, BitsAndBytesConfig) and four.bnb_4bit_quant_type == "nf4"
    assert str(four.bnb_4bit_compute_dtype) == "torch.float32"
    with pytest.raises(ValueError, match="8 bit and 4 bit"):
        rounding(True, True, "auto")
