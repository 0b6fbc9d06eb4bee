"""A decoding setting has one name, one help text and one check, wherever it is given."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import Field, FrozenInstanceError, fields, replace
from typing import Any

import pytest

from trl_diffusion import DecodingConfig, DTRPOConfig
from trl_diffusion.cli import main
from trl_diffusion.commands import collect, generate, train
from trl_diffusion.commands.collect import CollectArguments
from trl_diffusion.decoding.config import RolloutSettings
from trl_diffusion.decoding.options import OLD_NAMES, given_decoding


def another(setting: Field) -> Any:
    """A value of a setting that is not the default."""
    if setting.name == "strategy":
        return "sampled_threshold"  # the one that every other setting goes with
    if "choices" in setting.metadata:
        return list(setting.metadata["choices"])[-1]
    return True if setting.default is False else 0.25 if isinstance(setting.default, float) else 5


def wrong(setting: Field) -> Any:
    """A value that no setting of its kind can have."""
    if "choices" in setting.metadata:
        return "neither"
    return "yes" if setting.default is False else -0.5 if isinstance(setting.default, float) else 0


OTHER = {setting.name: another(setting) for setting in fields(RolloutSettings)}
WRONG = {setting.name: wrong(setting) for setting in fields(RolloutSettings)}


def words(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def training(**options) -> DTRPOConfig:
    return DTRPOConfig("out", bf16=False, **options)


def test_every_shared_setting_reaches_the_decoder_from_everywhere(tmp_path):
    assert OTHER.items() >= {"strategy": "sampled_threshold", "tokens_per_step": 5, "threshold": 0.25}.items()
    expected = DecodingConfig(9, 0.5, **OTHER)
    assert training(max_completion_length=9, temperature=0.5, **OTHER).decoding() == expected
    both = {"max_completion_length": 9, "temperature": 0.5, **OTHER}
    _, args, _ = train.parse([*words(both), "--output_dir", str(tmp_path), "--bf16", "false"])
    assert args.decoding() == expected
    args, _ = collect.parse(words(both))
    assert args.decoding() == expected
    switches = [word for word in words({"max_new_tokens": 9, "temperature": 0.5, **OTHER}) if word != "True"]
    assert given_decoding(generate._parser().parse_args(switches)) == expected
    assert DecodingConfig.from_dict({"max_new_tokens": 9, "temperature": 0.5, **OTHER}) == expected


@pytest.mark.parametrize("name", WRONG)
def test_every_shared_setting_is_checked_everywhere(name):
    for make in (DecodingConfig, training, CollectArguments):
        with pytest.raises(ValueError, match=f"`{name}` must be .*, got {WRONG[name]!r}"):
            make(**{name: WRONG[name]})


def test_defaults_are_the_same_everywhere():
    rollouts = training(max_completion_length=256, temperature=1.0).decoding(temperature=0.0)
    assert rollouts == DecodingConfig()
    assert CollectArguments().decoding() == DecodingConfig(17, 1.0, tokens_per_step=2)
    known = {
        "strategy": "confidence", "tokens_per_step": 1, "threshold": 0.9, "entropy_bound": 0.1, "steps_per_block": None,
        "schedule": "even", "sub_block_size": None, "stop_rule": "token", "approximate_cache": None,
        "tempered_confidence": False,
    }  # fmt: skip
    assert DecodingConfig().rollout_settings().items() >= known.items()


@pytest.mark.parametrize("command", ["train", "collect", "generate"])
def test_help_explains_every_setting(command, capsys):
    with pytest.raises(SystemExit):
        raise SystemExit(main([command, "--help"]))
    text = " ".join(capsys.readouterr().out.split())
    for setting in fields(RolloutSettings):
        help_text = setting.metadata["help"].replace("%%", "%")
        # Long words are broken at hyphens.
        assert help_text.replace(" ", "") in text.replace(" ", ""), setting.name


def test_help_of_evaluate_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        raise SystemExit(main(["evaluate", "--help"]))
    text = " ".join(capsys.readouterr().out.split())
    assert all(f" {setting.name}" in text for setting in fields(DecodingConfig))


# ------------------------------------------------------------------------------------------------------------ old names


@pytest.mark.parametrize(("old", "name"), OLD_NAMES.items())
@pytest.mark.parametrize("make", [training, CollectArguments], ids=["train", "collect"])
def test_old_names_are_understood(make, old, name):
    with pytest.warns(FutureWarning, match=f"`{old}` is called `{name}` now"):
        config = make(**{old: OTHER[name]})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* is called", category=FutureWarning)
        assert config.decoding() == make(**{name: OTHER[name]}).decoding()
        assert getattr(config, old) is None  # a copy is not told twice


@pytest.mark.parametrize(("old", "name"), OLD_NAMES.items())
@pytest.mark.parametrize("make", [training, CollectArguments], ids=["train", "collect"])
def test_both_names_at_once_are_refused(make, old, name):
    with pytest.raises(ValueError, match=f"`{old}` is the old name of `{name}`: give `{name}` alone, got both"):
        make(**{old: OTHER[name], name: OTHER[name]})


def test_old_names_on_a_command_line_and_in_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}\nbf16: false\ndecoding_strategy: threshold\nstep_schedule: linear\n")
    with pytest.warns(FutureWarning):
        _, args, _ = train.parse(["--config", str(recipe), "--confidence_threshold", "0.5"])
    assert (args.strategy, args.schedule, args.threshold) == ("threshold", "linear", 0.5)
    with pytest.warns(FutureWarning):
        args, _ = collect.parse(["--decoding_strategy", "threshold"])
    assert args.decoding().strategy == "threshold"


def test_values_under_old_names_are_checked():
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="`threshold` must be a number"):
        training(confidence_threshold=2.0)


# -------------------------------------------------------------------------------------------------------- DecodingConfig


def test_a_config_cannot_be_changed_and_can_be_copied():
    config = DecodingConfig(17, 0.5, suppress_tokens=[3, 4])
    for name in ("temperature", "tokens_per_step", "speed"):
        with pytest.raises(FrozenInstanceError, match=name):
            setattr(config, name, 1)
    same = (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config))
    assert {config, *same} == {config} and config.suppress_tokens == (3, 4)
    assert replace(config, temperature=1.0) != config
    with pytest.raises(ValueError, match="temperature"):
        replace(config, temperature=-1.0)


def test_a_function_is_a_strategy_of_decoding_alone():
    def strategy(view):
        return view.candidates

    assert DecodingConfig(strategy=strategy).to_dict()["strategy"].endswith("strategy")
    with pytest.raises(ValueError, match="`strategy` must be one of"):
        training(strategy=strategy)
