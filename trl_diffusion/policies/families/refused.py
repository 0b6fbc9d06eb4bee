"""Diffusion language models that have no mask token, so that nothing here can train them."""

from __future__ import annotations


# Their noise is uniform: a token that is not written yet is a random one.
UNIFORM = {"diffusion_gemma": "DiffusionGemma", "diffusion_gemma_text": "DiffusionGemma"}


def check_masked(model_type: str | None) -> None:
    """Raises a `ValueError` if models of this type are denoised from random tokens instead of masks."""
    if model_type in UNIFORM:
        raise ValueError(
            f"`{model_type}` ({UNIFORM[model_type]}) cannot be a policy here: it has no mask token. Its canvas is filled with random "
            "tokens, and each step may change any of them, so there are no newly unmasked tokens to score. Use a model that "
            "denoises masks (docs/models.md)."
        )
