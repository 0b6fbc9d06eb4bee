"""What `train` takes from where: recipes, the run that trained a policy, defaults and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trl_diffusion import DTRPOConfig, tiny_policy_path
from trl_diffusion.commands import adapt, recipes_path, sft, train
from trl_diffusion.commands.settings import FILE, find_settings, given_options, keep_settings


@pytest.fixture
def trained(tmp_path, monkeypatch) -> str:
    """A directory that holds what `keep_settings` leaves of a run of a recipe."""
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(recipes_path() / "tiny_countdown.yaml"), "--max_steps", "7", "--output_dir", "outputs/x"]
    keep_settings(find_settings(words).options, "outputs/x")
    return "outputs/x"


def test_options_of_a_command_line():
    words = "--a 1 --b=x=y --c --d e f --learning-rate -1e-3".split()
    assert given_options(words) == {"a": "1", "b": "x=y", "c": True, "d": ["e", "f"], "learning_rate": "-1e-3"}


def test_without_a_model_the_recipe_of_the_embedded_policy_applies():
    script, training, _ = train.parse(["--max_steps", "3"])
    recipe = recipes_path() / "tiny_sudoku.yaml"
    assert script.settings.line == (
        f"Settings: {recipe}, the recipe of the embedded policy; --max_steps from the command line."
    )
    assert training.learning_rate == 6e-4 and training.max_steps == 3


def test_a_policy_goes_on_with_the_options_that_it_was_trained_with(trained):
    """What belongs to the first run alone is not taken over: its output stays what it is."""
    kept = yaml.safe_load(Path(trained, FILE).read_text())
    assert kept["max_steps"] == "7" and kept["task"] == "countdown"
    assert not {"output_dir", "config", "model_name_or_path"} & set(kept)
    script, training, model = train.parse(["--model_name_or_path", trained, "--learning_rate", "1e-4"])
    assert (script.task, training.max_steps, training.max_completion_length) == ("countdown", 7, 12)
    assert (training.learning_rate, training.output_dir) == (1e-4, "outputs/x_continued")
    assert model.model_name_or_path == trained
    assert script.settings.line == (
        f"Settings: as {trained} was trained ({trained}/{FILE}); --model_name_or_path, --learning_rate from the command line."
    )
    _, training, _ = train.parse(["--model_name_or_path", f"{trained}/", "--output_dir", "outputs/y"])
    assert training.output_dir == "outputs/y"
    keep_settings(script.settings.options, "outputs/x_continued")  # and so on
    assert train.parse(["--model_name_or_path", "outputs/x_continued"])[1].learning_rate == 1e-4


def test_other_models_have_the_defaults_or_a_config(trained):
    Path(trained, FILE).unlink()
    script, training, _ = train.parse(["--model_name_or_path", trained, "--bf16", "false", "--beta", "0.1"])
    options = DTRPOConfig.__dataclass_fields__
    named = [
        f"{name} {options[name].default}" for name in ("learning_rate", "max_completion_length", "num_generations")
    ]
    assert script.settings.line == (
        f"Settings: the defaults of DTRPOConfig ({', '.join(named)}), as there is no --config; --model_name_or_path, --bf16, "
        "--beta from the command line."
    )
    assert training.learning_rate == 1e-6
    recipe = str(recipes_path() / "tiny_countdown.yaml")
    script, training, _ = train.parse(["--config", recipe, "--model_name_or_path", trained])
    assert script.settings.line == f"Settings: {recipe}; --model_name_or_path from the command line."
    assert training.output_dir == "outputs/tiny_countdown"


@pytest.mark.parametrize("parse", [train.parse, sft.parse, adapt.parse])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora_r", "4"], "`--lora_r` is for an adapter: add `--use_peft`, or leave it out."),
        (["--use_peft", "false", "--lora_alpha=8"], "`--lora_alpha` is for an adapter"),
        (["--bnb_4bit_quant_type", "fp4"], "`--bnb_4bit_quant_type` is for weights in 4 bits: add `--load_in_4bit`"),
        (["--use_bnb_nested_quant"], "`--use_bnb_nested_quant` is for weights in 4 bits"),
    ],
)
def test_options_that_nothing_would_look_at(parse, options, message, tmp_path):
    words = ["--model_name_or_path", tiny_policy_path(), "--output_dir", str(tmp_path), "--bf16", "false"]
    with pytest.raises(ValueError, match=message):
        parse([*words, *options])
    assert parse([*words, "--use_peft", "--lora_r", "4"])[-1].lora_r == 4


def test_an_adapter_goes_on_and_gets_no_other_one(trained):
    Path(trained, "adapter_config.json").touch()
    assert train.parse(["--model_name_or_path", trained])[2].model_name_or_path == trained
    with pytest.raises(ValueError, match=f"{trained} is an adapter, .*; --lora_r, --use_peft would make another one"):
        train.parse(["--model_name_or_path", trained, "--use_peft", "--lora_r", "4"])
