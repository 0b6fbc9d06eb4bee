"""The commands, one in each module. `trl-diffusion` and the launchers in recipes/ start them."""

from __future__ import annotations

from pathlib import Path

from ..quiet import hush
from .interrupt import end_imports_in_a_line


PACKAGE = Path(__file__).parents[1]
end_imports_in_a_line()
hush()  # before a command imports what it needs


def recipes_path() -> Path:
    """The folder of the YAML recipes: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"
