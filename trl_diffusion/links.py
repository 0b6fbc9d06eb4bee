"""Where the files of the repository are, for messages: in the checkout, or on the web if only the package is installed."""

from __future__ import annotations

from pathlib import Path


REPOSITORY = "https://github.com/trl-diffusion/trl-diffusion"  # as in pyproject.toml


def link(path: str) -> str:
    """
    Where somebody can read a file of the repository.

    Args:
        path (`str`): its path in the repository, perhaps with an anchor: `docs/quickstart.md#5-a-real-model`.

    Returns:
        `str`: the path from the current directory in a checkout, without the anchor; elsewhere its address.
    """
    file = Path(__file__).parents[1] / path.partition("#")[0]
    if not file.is_file():
        return f"{REPOSITORY}/blob/main/{path}"
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)
