"""A decoding setting has one name, one help text and one check, wherever it is given."""

from __future__ import annotations

import copy
import pickle
from dataclasses import Field, FrozenInstanceError, fields, replace
from typing import Any

import pytest

from trl_diffusion import DecodingConfig, DTRPOConfig
from trl_diffusion import generate as decoding_generate
from trl_diffusion.cli import main
from trl_diffusion.commands import collect, generate, train
from trl_diffusion.commands.collect import CollectArguments
from trl_diffusion.decoding.config import RolloutSettings
from trl_diffusion.decoding.options import given_decoding


def another(setting: Field) -> Any:
    """A value of a setting that is not the default."""
    if setting.name == "strategy":
        return "sampled_threshold"  # the one that most others go with
    if "choices" in setting.metadata:
        return list(setting.metadata["choices"])[-1]
    return True if setting.default is False else 0.25 if isinstance(setting.default, float) else 5


def wrong(setting: Field) -> Any:
    """A value that no setting of its kind can have."""
    if "choices" in setting.metadata:
        return "neither"
    return "yes" if setting.default is False else -0.5 if isinstance(setting.default, float) else 0


# All of them, in sets of which each goes together.
REVISING = ("revision", "revision_threshold", "edit_threshold", "revision_rate", "revision_max", "revision_limit",
            "revision_steps", "fill_share")  # fmt: skip
EVERY = {setting.name: another(setting) for setting in fields(RolloutSettings)}
SETS = [
    {name: EVERY[name] for name in EVERY if name not in ("steps_per_block", "schedule", "entropy_bound", *REVISING)},
    {"steps_per_block": EVERY["steps_per_block"], **{name: EVERY[name] for name in REVISING}},
    {"steps_per_block": EVERY["steps_per_block"], "schedule": EVERY["schedule"]},
    {"strategy": "entropy_bound", "entropy_bound": EVERY["entropy_bound"]},
]
OTHER = SETS[0]
WRONG = {setting.name: wrong(setting) for setting in fields(RolloutSettings)}


def words(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def training(**options) -> DTRPOConfig:
    return DTRPOConfig("out", bf16=False, **options)


def test_every_shared_setting_reaches_the_decoder_from_everywhere(tmp_path):
    assert OTHER.items() >= {"strategy": "sampled_threshold", "tokens_per_step": 5, "threshold": 0.25}.items()
    assert {name for some in SETS for name in some} == set(EVERY)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}\nbf16: false\n")
    for some in SETS:
        expected = DecodingConfig(9, 0.5, **some)
        assert training(max_completion_length=9, temperature=0.5, **some).decoding() == expected
        both = {"max_completion_length": 9, "temperature": 0.5, **some}
        _, args, _ = train.parse(["--config", str(recipe), *words(both)])
        assert args.decoding() == expected
        args, _ = collect.parse(words({"tokens_per_step": 1, **both} if "entropy_bound" in some else both))
        assert args.decoding() == expected
        switches = [word for word in words({"max_new_tokens": 9, "temperature": 0.5, **some}) if word != "True"]
        assert given_decoding(generate._parser().parse_args(switches)) == expected
        assert DecodingConfig.from_dict({"max_new_tokens": 9, "temperature": 0.5, **some}) == expected


def test_settings_that_nothing_looks_at(tmp_path):
    """Given together or without what they need, they are refused, in whichever way they are given."""
    both = {"tokens_per_step": 3, "steps_per_block": 4}
    with pytest.raises(ValueError, match="`tokens_per_step=3` and `steps_per_block=4` both say"):
        DecodingConfig(**both)
    cases = (
        (both, "`tokens_per_step=3` and `steps_per_block=4` both say how many positions a step unmasks. Give one"),
        (
            {"threshold": 0.5},
            "`threshold=0.5` is for the strategy 'threshold' or 'sampled_threshold', not for 'confidence'. Set",
        ),
        (
            {"entropy_bound": 0.5, "strategy": "threshold"},
            "`entropy_bound=0.5` is for the strategy 'entropy_bound', not for 'thr",
        ),
        ({"schedule": "linear"}, "`schedule='linear'` divides `steps_per_block`, which is not set"),
    )
    model, tokenizer = object(), object()
    for settings, message in cases:
        for make in (
            lambda settings: training(**settings),
            lambda settings: CollectArguments(**settings),
            DecodingConfig.from_dict,
            lambda settings: given_decoding(generate._parser().parse_args(words(settings))),
            lambda settings: decoding_generate(model, tokenizer, "x", **settings),
        ):
            with pytest.raises(ValueError) as error:
                make(settings)
            assert str(error.value).startswith(message)
    for explicit in (DecodingConfig.from_dict, lambda settings: decoding_generate(model, tokenizer, "x", **settings)):
        with pytest.raises(ValueError, match="both say"):  # even with the default
            explicit({"tokens_per_step": 1, "steps_per_block": 4})
    assert CollectArguments(steps_per_block=4).decoding() == DecodingConfig(17, 1.0, steps_per_block=4)
    own = {"strategy": lambda view: view.candidates, "threshold": 0.5}  # which may look at anything
    assert DecodingConfig.from_dict(own).threshold == 0.5


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
        raise SystemExit(main([command, "--help-all"]))
    text = " ".join(capsys.readouterr().out.split())
    for setting in fields(RolloutSettings):
        help_text = setting.metadata["help"].replace("%%", "%")
        # Long words are broken at hyphens.
        assert help_text.replace(" ", "") in text.replace(" ", ""), setting.name


def test_help_of_evaluate_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        raise SystemExit(main(["evaluate", "--help-all"]))
    text = " ".join(capsys.readouterr().out.split())
    assert all(f" {setting.name}" in text for setting in fields(DecodingConfig))


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
