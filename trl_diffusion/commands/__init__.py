"""The commands, one in each module. `trl-diffusion` and the launchers in recipes/ start them."""

from __future__ import annotations

from pathlib import Path

from ..quiet import hush


PACKAGE = Path(__file__).parents[1]
hush()  # before a command imports what it needs


def recipes_path() -> Path:
    """The folder of the YAML recipes: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"
