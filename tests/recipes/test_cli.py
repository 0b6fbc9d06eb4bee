"""The command `trl-diffusion`, in this process: what it says, and what it would start."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import SPECS
from tests.viz.test_viewer import make_batch, write_dataset
from trl_diffusion import DecodingConfig, DTRPOConfig, __version__, generate, tiny_policy_path
from trl_diffusion.cli import EXAMPLES, main
from trl_diffusion.commands import plan


ROOT = Path(__file__).resolve().parents[2]
OWN = {"train": ["task", "eval_file"], "collect": ["num_responses", "output_dir"], "evaluate": ["tasks", "decoding"]}


@pytest.fixture
def started(monkeypatch):
    """What `accelerate launch` is told by the commands that this process would become."""
    found = []

    def execv(program, words):
        assert program == words[0] == sys.executable and words[1:3] == ["-m", "trl_diffusion.commands.launch"]
        found.append(launch_command_parser().parse_args(words[3:]))

    monkeypatch.setattr(os, "execv", execv)
    return found


def says(capsys, *words: str) -> str:
    """What a command that ends well prints."""
    try:
        assert main(list(words)) == 0
    except SystemExit as end:
        assert not end.code
    return capsys.readouterr().out


def complains(capsys, *words: str) -> str:
    """What a command that ends with exit code 2 says on stderr."""
    try:
        assert main(list(words)) == 2
    except SystemExit as end:
        assert end.code == 2
    out, err = capsys.readouterr()
    assert not out
    return err


def test_help_names_every_command(capsys):
    text = says(capsys)
    assert text == says(capsys, "--help")
    assert re.findall(r"^    (\w+) +\w", text, re.MULTILINE) == [
        "train", "collect", "evaluate", "iterate", "generate", "plan", "view"
    ]  # fmt: skip
    assert says(capsys, "--version").split() == ["trl-diffusion", __version__]


@pytest.mark.parametrize("name", OWN)
def test_help_of_a_recipe(name, capsys):
    text = says(capsys, name, "--help")
    assert f"    trl-diffusion {name}" in text
    options = {"accelerate_config", "num_processes", *OWN[name]}
    if name == "train":
        options |= {"config"} | {field.name for field in dataclasses.fields(DTRPOConfig) if field.init} - {
            "deepspeed_plugin"
        }
    assert not {option for option in options if f"--{option}" not in text}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("generate", ["--chat", "--adapter", *(f"--{field.name}" for field in dataclasses.fields(DecodingConfig))]),
        ("plan", ["--gpus", "--memory", "--config", "--prompts", "--epochs", "--answer_length", "--tflops", "--bandwidth"]),
        ("view", ["--response", "--output", "--tokenizer"]),
    ],
)  # fmt: skip
def test_help_of_the_others(name, options, capsys):
    text = says(capsys, name, "--help")
    assert f"    trl-diffusion {name} " in text and "python -m" not in text
    assert not [option for option in options if f"  {option}" not in text]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tarin"], "invalid choice: 'tarin'.*train.*collect.*evaluate.*generate.*plan.*view"),
        (["train", "--config", "lama"], "--config: there is no file lama, .*llada, llada_24gb"),
        (["plan", "x", "--config", "lama"], "--config: there is no file lama"),
        (["collect", "--accelerate_config", "zero4"], "--accelerate_config: there is no file zero4, .*zero2, zero3"),
        (["evaluate", "--num_processes", "two"], "--num_processes: must be a whole number of at least 1, got 'two'"),
        (["collect", "--num_processes", "0"], "--num_processes: must be a whole number of at least 1, got '0'"),
        (["generate", ""], "error: The prompt is empty"),
        (["generate", "x", "--chat"], "error: --chat: the tokenizer has no chat template"),
        (["generate", "x", "--temperature", "-1"], "error: .*temperature"),
        (["generate", "x", "--model", "no/such/model/here"], "error: .*no/such/model/here"),
        (["view", "nowhere", "0"], "error: There is no directory nowhere"),
    ],
)
def test_mistakes(words, message, capsys, started):
    assert re.search(message, complains(capsys, *words), re.DOTALL)
    assert not started


def test_a_recipe_is_started(started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["train", "--learning_rate", "1e-3", "--config", "tiny_countdown", "--use_peft"])
    (launch,) = started
    assert launch.module and launch.config_file is None and launch.num_processes is None
    config, path, *rest = launch.training_script_args
    assert config == "--config" and rest == ["--learning_rate", "1e-3", "--use_peft"]
    assert Path(path).samefile(ROOT / "recipes" / "tiny_countdown.yaml")
    for name in OWN:
        main([name, "--accelerate_config", "zero3", "--num_processes", "4", "--seed", "-1"])
        launch = started[-1]
        assert launch.training_script == f"trl_diffusion.commands.{name}" and find_spec(launch.training_script)
        assert Path(launch.config_file).samefile(ROOT / "recipes" / "accelerate" / "zero3.yaml")
        assert launch.num_processes == 4 and launch.training_script_args == ["--seed", "-1"]


def test_names_of_files(started, tmp_path, monkeypatch):
    """A file that is there comes first; the path of a recipe in the documentation holds without a checkout, too."""
    monkeypatch.chdir(tmp_path)
    main(["train", "--config", "recipes/llada.yaml", "--accelerate_config", "recipes/accelerate/ddp.yaml"])
    assert Path(started[0].training_script_args[1]).samefile(ROOT / "recipes" / "llada.yaml")
    assert Path(started[0].config_file).samefile(ROOT / "recipes" / "accelerate" / "ddp.yaml")
    Path("llada").write_text("seed: 1\n")
    main(["train", "--config=llada"])
    assert started[1].training_script_args == ["--config", "llada"]


def test_examples_are_commands(started, monkeypatch, capsys):
    """Those that the help shows and that start a recipe; the others run below."""
    examples = [shlex.split(line)[1:] for line in EXAMPLES.splitlines() if line.startswith("  trl-diffusion")]
    assert {words[0] for words in examples} == {"train", "collect", "evaluate", "iterate", "generate", "plan", "view"}
    starting = [words for words in examples if words[0] in OWN]
    for words in starting:
        main(words)
    assert [launch.training_script.rpartition(".")[2] for launch in started] == [words[0] for words in starting]


def test_generate(capsys, monkeypatch):
    prompt = "sudoku 3102200002100320"
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_path())
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    for options, settings in (
        ([], {}),
        (["--temperature", "1.5", "--tokens_per_step", "2", "--strategy", "random", "--seed", "3"],
         {"temperature": 1.5, "tokens_per_step": 2, "strategy": "random", "seed": 3}),
    ):  # fmt: skip
        (expected,) = generate(model, tokenizer, prompt, max_new_tokens=17, **settings).texts
        assert says(capsys, "generate", prompt, "--max_new_tokens", "17", *options) == f"{expected}\n"
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{prompt}\n"))
        shown = says(capsys, "generate", "--max_new_tokens", "17", "--stream", *options)
        assert shown.splitlines()[-1] == expected and "░" in shown


def test_plan_with_a_recipe(monkeypatch):
    """What the plan is told; it runs in `tests/test_packaging.py`."""
    told = []
    monkeypatch.setattr(plan, "main", lambda arguments: told.append(arguments) or 0)
    assert main(["plan", "MODEL", "--gpus", "1", "--config", "tiny_sudoku"]) == 0
    assert main(["plan", "MODEL"]) == 0
    (option, path, *rest), plain = told
    assert option == "--config" and Path(path).samefile(ROOT / "recipes" / "tiny_sudoku.yaml")
    assert rest == ["MODEL", "--gpus", "1"] and plain == ["MODEL"]


def test_view(capsys, tmp_path):
    spec = SPECS["block-from-sequence"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    write_dataset(tmp_path / "data", tokenizer, spec, make_batch(spec), tokenizer=tiny_policy_path())
    page = tmp_path / "page.html"
    text = says(capsys, "view", str(tmp_path / "data"), "1", "--response", "1", "--output", str(page))
    assert text.startswith(f"{page}\n") and "<table" in page.read_text()
