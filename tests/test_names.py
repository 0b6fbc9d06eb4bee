"""A setting that goes by another name here is answered with the right one: in Python, on the command line and in YAML."""

from __future__ import annotations

import re

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_diffusion import DecodingConfig, DTRPOConfig, collect, generate, tiny_policy_path
from trl_diffusion.commands import collect as collect_command
from trl_diffusion.commands import evaluate, iterate, sft, train
from trl_diffusion.fields import nearest
from trl_diffusion.names import SAME, other_names


TRAINING = {"num_responses": "num_generations", "max_new_tokens": "max_completion_length"}
COLLECTING = {"num_generations": "num_responses", "max_new_tokens": "max_completion_length"}
EARLIER = {"decoding_strategy": "strategy", "step_schedule": "schedule", "confidence_threshold": "threshold"}
DECODING = {"max_completion_length": "max_new_tokens", **EARLIER}


def test_names_in_python(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_path())
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())

    def collecting(**options):
        prompts = Dataset.from_dict({"prompt": ["1+1="]})
        return collect(
            model, tokenizer, prompts, lambda completions, **_: [0.0], tmp_path, DecodingConfig(8), **options
        )

    def generating(**options):
        return generate(model, tokenizer, "1+1=", **options)

    for call, names in (
        (lambda **options: DTRPOConfig("out", bf16=False, **options), {**TRAINING, **EARLIER}),
        (collecting, {"num_generations": "num_responses", "rollout_batch_size": "batch_size"}),
        (DecodingConfig, DECODING),
        (generating, DECODING),
    ):
        for name, here in names.items():
            with pytest.raises(TypeError, match=f"^`{name}` is called `{here}` here"):
                call(**{name: 8})
    with pytest.raises(
        ValueError, match="Unknown decoding settings .* Is max_completion_length meant to be max_new_tokens[?]"
    ):
        DecodingConfig.from_dict({"max_completion_length": 8})


WORDS = {
    train: {
        **TRAINING, **EARLIER, "model": "model_name_or_path", "batch_size": "per_device_train_batch_size", "tasks": "task",
        "lr": "learning_rate", "epochs": "num_train_epochs",
    },
    sft: {"dataset_name": "train_file", "dataset": "train_file"},
    collect_command: {**COLLECTING, **EARLIER, "adapter": "adapter_name_or_path", "per_device_train_batch_size": "batch_size"},
    evaluate: {"task": "tasks", "model": "model_name_or_path", "seed": "seeds", "tokenizer": "tokenizer_name_or_path"},
}  # fmt: skip


@pytest.mark.parametrize("module", WORDS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_names_on_the_command_line(module, capsys):
    for name, here in WORDS[module].items():
        with pytest.raises(SystemExit) as end:
            module.main([f"--{name}", "8"])
        line = capsys.readouterr().err.rstrip().splitlines()[-1]
        assert end.value.code == 2 and "error: " in line and f"--{name}" in line and f"--{here}" in line


def test_names_in_yaml(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for module, text, name, here in (
        (train, "output_dir: out\nmax_new_tokens: 8\n", "max_new_tokens", "max_completion_length"),
        (collect_command, "num_generations: 8\n", "num_generations", "num_responses"),
        (evaluate, "task: sudoku\n", "task", "tasks"),
        (iterate, "output_dir: out\ncollect: {num_generations: 4}\n", "--num_generations", "--num_responses"),
        (iterate, "output_dir: out\ntrain: {max_new_tokens: 4}\n", "max_new_tokens", "max_completion_length"),
        (iterate, "output_dir: out\nseeds: 4\n", "seeds", "seed"),
    ):
        (tmp_path / "options.yaml").write_text(text)
        try:
            assert module.main(["--config", "options.yaml"]) == 2
        except SystemExit as end:
            assert end.code == 2
        error = capsys.readouterr().err.rstrip().splitlines()[-1]
        assert "error: " in error and re.search(
            f"{name}.* (meant to be|called) (--)?{here.removeprefix('--')}\\b", error
        ), error


def test_what_is_meant():
    known = ["max_new_tokens", "rollout_batch_size", "batch_size", "temperature", "top_k", "top_p"]
    assert nearest("completion_length", known) == ["max_new_tokens"]
    assert nearest("per_device_train_batch_size", known) == ["batch_size"]  # the first of its names
    assert nearest("temperatur", known) == ["temperature"] and nearest("top", known) == ["top_k", "top_p"]
    assert nearest("q", known) == other_names("max_new_tokens", known) == other_names("temperatur", known) == []
    assert all(len(set(group)) == len(group) > 1 for group in SAME)
