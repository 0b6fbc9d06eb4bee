"""The embedded policy: small enough to ship with the package, so that everything can be tried without a download."""

from __future__ import annotations

from importlib.resources import files


def tiny_policy_path() -> str:
    """
    Directory of the embedded policy and its tokenizer, for `from_pretrained` or `DTRPOTrainer(model=...)`.

    It is a block-diffusion model (stock Qwen3 backbone, blocks of 8 characters) that has been pretrained on 4x4 sudokus
    and countdown puzzles by `recipes/pretrain_tiny.py`, just far enough to be bad at both.
    """
    return str(files("trl_diffusion.policies") / "tiny_policy")
