"""Worlds for hostile programs, and weaker sandboxes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rewards.world import SECRET, World
from trl_diffusion.rewards import sandbox


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield from make_world(tmp_path_factory.mktemp("world"), patch)


@pytest.fixture
def own_world(tmp_path, monkeypatch):
    """A world that may come to harm."""
    yield from make_world(tmp_path, monkeypatch)


def make_world(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[World]:
    patch.setenv("NAME_OF_SECRET", SECRET)
    world = World(folder)
    patch.setattr(tempfile, "tempdir", str(world.temporary))
    yield world
    world.close()


@pytest.fixture
def change_confined(tmp_path, monkeypatch) -> Callable[..., None]:
    """Adds lines to what the confined processes run."""

    def change(lines: str, file: str = "confine.py") -> None:
        confined = tmp_path / "confined"
        if not confined.exists():
            shutil.copytree(sandbox._CONFINED, confined)
        with (confined / file).open("a") as opened:
            opened.write(f"\n\n{lines}\n")
        monkeypatch.setattr(sandbox, "_CONFINED", str(confined))

    return change
