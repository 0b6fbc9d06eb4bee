"""YAML and JSON that give a key twice are refused by file, key and line, wherever a command reads them."""

from __future__ import annotations

import pytest
import yaml

from trl_diffusion.commands import collect, evaluate, plan, recipes_path, train
from trl_diffusion.utils import check_config_file, load_yaml, read_mapping


TWICE = "output_dir: a\nseed: 1\nmax_steps: 2\nseed: 3\n"


@pytest.fixture
def twice(tmp_path) -> str:
    path = tmp_path / "twice.yaml"
    path.write_text(TWICE)
    return str(path)


@pytest.mark.parametrize("command", [train, collect, evaluate])
def test_config_of_a_command(twice, command):
    with pytest.raises(ValueError, match=r"twice.yaml: line 4: the key 'seed' is already in line 2"):
        command.parse(["--config", twice])


def test_config_of_the_plan(twice, capsys):
    assert plan.main(["nothing", "--config", twice]) == 2
    assert "the key 'seed' is already in line 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "strategy:threshold+strategy:confidence",
        '{"threshold": 0.5, "threshold": 0.9}',
        "{threshold: 0.5, threshold: 0.9}",
    ],
)
def test_mappings_of_the_command_line(text):
    with pytest.raises(ValueError, match=r"`decoding`: line \d: the key '(strategy|threshold)' is already in line 1"):
        read_mapping(text, "decoding")


def test_mappings_in_files(tmp_path):
    path = tmp_path / "decoding.json"
    path.write_text('{"threshold": 0.5,\n "threshold": 0.9}')
    with pytest.raises(ValueError, match=r"decoding.json: line 2: the key 'threshold' is already in line 1"):
        read_mapping(str(path), "decoding")


def test_what_is_not_twice(tmp_path):
    """The same key in two mappings, and what a merge brings in and the mapping overrides."""
    path = tmp_path / "recipe.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {x: 3}\nc: &c\n  <<: *a\n  x: 4\nd: {<<: *c, y: 5}\n")
    assert load_yaml(path) == yaml.safe_load(path.read_text())
    assert check_config_file(["--config", str(path), "--seed", "1", "--seed", "2"])[-1] == "2"
    with pytest.raises(FileNotFoundError, match="There is no file nothing.yaml"):
        check_config_file(["--config", "nothing.yaml"])


def test_shipped_recipes_give_every_key_once():
    files = list(recipes_path().rglob("*.yaml"))
    assert len(files) > 15
    for file in files:
        load_yaml(file)
