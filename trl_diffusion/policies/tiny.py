"""The embedded policies: small enough to ship with the package, so that everything can be tried without a download."""

from __future__ import annotations

from importlib.resources import files

from ..fields import check_one_of


DIRECTORIES = {"block": "tiny_policy", "full": "tiny_full", "revising": "tiny_revising"}
PREFIX = "embedded:"


def tiny_policy_path(name: str = "block") -> str:
    """
    Directory of an embedded policy and its tokenizer, for `from_pretrained` or `DTRPOTrainer(model=...)`. All have a stock Qwen3
    backbone and were pretrained by `recipes/pretrain_tiny.py`, just far enough to be bad at puzzles.

    Args:
        name (`str`, *optional*, defaults to `"block"`):
            `"block"`: blocks of 8 characters, for 4x4 sudokus and countdown puzzles. `"full"`: full attention over the whole
            answer, for 4x4 sudokus with two clues. `"revising"`: as `"full"`, but it was also shown wrong tokens, so that
            it can take tokens back (see the settings `revision...` of [`DecodingConfig`]).

    Raises:
        ValueError: for another name.
    """
    check_one_of("name", name, DIRECTORIES)
    return str(files("trl_diffusion.policies") / DIRECTORIES[name])


def resolve_embedded(path: str) -> str:
    """The directory of a policy that is given as `embedded:NAME`; any other path or hub id as it is."""
    return tiny_policy_path(path.removeprefix(PREFIX)) if path.startswith(PREFIX) else path
