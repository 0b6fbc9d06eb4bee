"""The command `trl-diffusion`, in this process: what it says, and what it would start."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, ModelConfig, SFTConfig

from tests.conftest import SPECS
from tests.viz.test_viewer import make_batch, write_dataset
from trl_diffusion import DecodingConfig, __version__, generate, tiny_policy_path
from trl_diffusion.cli import DIRECT, EXAMPLES, main
from trl_diffusion.commands import adapt, collect, evaluate, plan, sft, train
from trl_diffusion.commands.collect import OPENING
from trl_diffusion.commands.parser import MACHINES
from trl_diffusion.sft.config import is_refused as is_refused_for_sft
from trl_diffusion.tasks.load import TASKS
from trl_diffusion.trainer.config import is_refused


ROOT = Path(__file__).resolve().parents[2]
OWN = ("train", "sft", "adapt", "collect", "evaluate")


@pytest.fixture
def started(monkeypatch):
    """What `accelerate launch` is told by the commands that this process would become."""
    found = []

    def execve(program, words, environment):
        assert program == words[0] == sys.executable and words[1:3] == ["-m", "trl_diffusion.commands.launch"]
        found.append(launch_command_parser().parse_args(words[3:]))
        found[-1].typed = environment["TRL_DIFFUSION_COMMAND"]

    monkeypatch.setattr(os, "execve", execve)
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
        "train", "sft", "adapt", "collect", "evaluate", "iterate", "compare", "generate", "serve", "doctor", "plan", "view",
        "completion",
    ]  # fmt: skip
    assert says(capsys, "--version").split() == ["trl-diffusion", __version__]


KINDS = {
    "train": train.KINDS, "sft": sft.KINDS, "adapt": adapt.KINDS, "collect": collect.KINDS, "evaluate": evaluate.KINDS,
}  # fmt: skip

REFUSED = {"train": is_refused, "sft": is_refused_for_sft, "adapt": adapt.is_left_out}


def listed(text: str) -> set[str]:
    """The options that a help lists."""
    return set(re.findall(r"^  --(\w+)", text, re.MULTILINE)) - {"help", "help_all"}


@pytest.mark.parametrize("name", KINDS)
def test_help_of_a_recipe(name, capsys, monkeypatch):
    """`--help` lists all options of ours and the most needed of the inherited ones, `--help-all` all that are not refused, and those of
    several machines."""
    monkeypatch.setenv("COLUMNS", "120")
    short, full = says(capsys, name, "--help"), says(capsys, name, "--help-all")
    assert f"    trl-diffusion {name}" in short
    known = {field.name for kind in KINDS[name] for field in dataclasses.fields(kind) if field.init}
    inherited = {field.name for kind in (GRPOConfig, SFTConfig, ModelConfig) for field in dataclasses.fields(kind)}
    model = {field.name for field in dataclasses.fields(ModelConfig)}
    refused = model & known - set(OPENING)
    if name in REFUSED:
        refused = {option for option in known if REFUSED[name](option)}
    taken = {"config", "accelerate_config", "num_processes", *MACHINES, *known} - refused
    assert taken - inherited - {*MACHINES} <= listed(short) <= taken - {*MACHINES}
    assert taken <= listed(full) and not listed(full) & refused
    assert len(short.splitlines()) < 170
    left_out = re.search(r"--help-all lists (\d+) more options", short)
    assert (int(left_out[1]) if left_out else 0) == len(taken - listed(short))


@pytest.mark.parametrize("name", DIRECT)
def test_every_option_is_explained(name):
    """In words, and not only by its default."""
    for action in import_module(f"trl_diffusion.commands.{name}")._parser().options():
        words = re.sub(r"\(default: .*\)|default \S+", "", action.help or "")
        assert len(words.split()) > 1, (name, action.option_strings)


def test_help_shows_the_defaults_of_a_recipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert re.search(r"--max_steps N .*\(default: 60\)", says(capsys, "train", "--help"))
    assert re.search(r"--max_steps N .*\(default: 500\)", says(capsys, "train", "--config", "llada", "--help"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("generate", ["--chat", "--adapter", *(f"--{field.name}" for field in dataclasses.fields(DecodingConfig))]),
        ("plan", ["--gpus", "--memory", "--config", "--prompts", "--epochs", "--answer_length", "--tflops", "--bandwidth"]),
        ("doctor", ["--config", "--layers", "--dtype", "--seconds", "--prompt_length"]),
        ("view", ["--response", "--output", "--tokenizer"]),
        ("iterate", ["--rounds", "--config", "--accelerate_config"]),
    ],
)  # fmt: skip
def test_help_of_the_others(name, options, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = says(capsys, name, "--help")
    assert f"    trl-diffusion {name} " in text and "python -m" not in text
    assert not [option for option in options if f"  {option}" not in text]
    assert len(text.splitlines()) < 80


UNKNOWN = [
    (["train", "--learning_rat", "1"], "there is no option --learning_rat; .* Is it meant to be --learning_rate?"),
    (["train", "--max_comp", "8"], "there is no option --max_comp; .* Is it meant to be --max_completion_length?"),
    (
        ["train", "--accelerate_confg=zero3"],
        "there is no option --accelerate_confg; .* Is it meant to be --accelerate_config?",
    ),
    (["sft", "--weightin", "mean"], "there is no option --weightin; .* Is it meant to be --weighting?"),
    (["collect", "--num_respons", "4"], "there is no option --num_respons; .* Is it meant to be --num_responses?"),
    (["adapt", "m", "--mask", "x"], "there is no option --mask; .* Is it meant to be --mask_token?"),
    (
        ["evaluate", "--task", "sudoku"],
        "there is no option --task; `trl-diffusion evaluate --help-all` lists those that there are. Is it meant to be --tasks?",
    ),
    (
        ["evaluate", "--xyzzy"],
        "there is no option --xyzzy; `trl-diffusion evaluate --help-all` lists those that there are.\n$",
    ),
    (["generate", "x", "--max_new", "8"], "there is no option --max_new; .* Is it meant to be --max_new_tokens?"),
    (["plan", "x", "--gpu", "8"], "there is no option --gpu; .* Is it meant to be --gpus?"),
    (["view", "x", "0", "--resp", "1"], "there is no option --resp; .* Is it meant to be --response?"),
    (["iterate", "--round", "2"], "there is no option --round; .* Is it meant to be --rounds?"),
    (["completion", "bash", "--shell"], "there is no option --shell; `trl-diffusion completion --help-all` lists"),
    (["generate", "x", "y"], "'y' is no argument of `trl-diffusion generate`"),
    (["--versio"], "there is no option --versio; .* Is it meant to be --version?"),
    (
        ["tarin"],
        "there is no command 'tarin'; there are train, sft, adapt, .*, completion. Is it meant to be train?",
    ),
    (["eval", "--tasks", "x"], "there is no command 'eval'; .* Is it meant to be evaluate?"),
]


@pytest.mark.parametrize(("words", "message"), UNKNOWN)
def test_options_are_not_abbreviated(words, message, capsys):
    """An unknown option or command is answered with the nearest one, in one line, by every command."""
    launched = {"train": train, "sft": sft, "adapt": adapt, "collect": collect, "evaluate": evaluate}.get(words[0])
    if launched is None:
        line = complains(capsys, *words)
    else:  # as `accelerate launch` starts it
        with pytest.raises(SystemExit) as end:
            launched.main(words[1:])
        assert end.value.code == 2
        line = capsys.readouterr().err
    assert len(line.splitlines()) == 1 and re.match(f"error: {message.replace('?', '[?]')}", line), line


TWO, FIRST = ("--accelerate_config", "zero3_2x8"), ("--main_process_ip", "first")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapt", "--config", "lama"], "--config: there is no file lama, .*smollm2_word_sums"),
        (["train", "--config", "lama"], "--config: there is no file lama, .*llada, llada2, .*llada_24gb"),
        (["plan", "x", "--config", "lama"], "--config: there is no file lama"),
        (["collect", "--accelerate_config", "zero4"], "--accelerate_config: there is no file zero4, .*zero2, zero3"),
        (["evaluate", "--num_processes", "two"], "--num_processes: must be a whole number of at least 1, got 'two'"),
        (["collect", "--num_processes", "0"], "--num_processes: must be a whole number of at least 1, got '0'"),
        (["train", "--accelerate_config", "zero3_2x8"], "2 machines train together: .*; --machine_rank is missing"),
        (["train", *TWO, "--machine_rank", "1"], "2 machines train together: .*; --main_process_ip is missing"),
        (
            ["train", *TWO, *FIRST, "--machine_rank", "2"],
            "--machine_rank must be below the number of machines, 2, got 2",
        ),
        (["train", *TWO, "--machine_rank", "-1"], "--machine_rank: must be a whole number of at least 0, got '-1'"),
        (
            ["train", *TWO, *FIRST, "--machine_rank", "0", "--num_processes", "3"],
            "--num_processes must be a multiple .* 2, got 3",
        ),
        (["train", "--accelerate_config", "zero3", *FIRST], "--main_process_ip is for several machines"),
        (["collect", "--num_machines", "2"], "several machines need an engine: add --accelerate_config"),
        (["iterate", *TWO], "zero3_2x8.yaml is for 2 machines, and `trl-diffusion iterate` runs on one"),
        (["view", "x"], "error: There is no directory x"),
        (["plan", "x", "--gpus", "two\x1b[2J"], r"error: argument --gpus: invalid int value: 'two\\x1b\[2J'"),
        (["generate", ""], "error: The prompt is empty"),
        (["generate", "x", "--chat"], "error: --chat: the tokenizer has no chat template"),
        (["generate", "x", "--temperature", "-1"], "error: .*temperature"),
        (["generate", "x", "--model", "no/such/model/here"], "error: .*no/such/model/here"),
        (["view", "nowhere", "0"], "error: There is no directory nowhere"),
    ],
)
def test_mistakes(words, message, capsys, started):
    line = complains(capsys, *words)
    assert re.search(message, line) and len(line.splitlines()) == 1
    assert not started


def test_a_recipe_is_started(started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["train", "--learning_rate", "1e-3", "--config", "tiny_countdown", "--use_peft"])
    (launch,) = started
    assert launch.typed == "trl-diffusion train --learning_rate 1e-3 --config tiny_countdown --use_peft"
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


def test_several_machines(started, tmp_path):
    """Each machine has its rank. A config of accelerate's own may name rank and first machine, and options the number of machines."""
    main(["train", *TWO, *FIRST, "--machine_rank", "1", "--main_process_port", "29501", "--seed", "3"])
    own = tmp_path / "own.yaml"
    config = (ROOT / "recipes" / "accelerate" / "fsdp2_2x8.yaml").read_text()
    own.write_text(config.replace("machine_rank: 0", "machine_rank: 1\nmain_process_ip: first"))
    main(["train", "--accelerate_config", str(own)])
    four = ["--num_machines", "4", "--num_processes", "32", "--machine_rank", "3"]
    main(["sft", "--accelerate_config", "zero3", *four, *FIRST])
    found = [_validate_launch_command(launch)[0] for launch in started]
    assert [(one.num_machines, one.num_processes, one.machine_rank) for one in found] == [
        (2, 16, 1),
        (2, 16, 1),
        (4, 32, 3),
    ]
    assert {one.main_process_ip for one in found} == {"first"}
    assert started[0].main_process_port == 29501 and started[0].training_script_args == ["--seed", "3"]


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
    assert {words[0] for words in examples} == {*OWN, "iterate", "compare", "generate", "plan", "view"}
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
    monkeypatch.setattr(plan, "_run", told.append)
    assert main(["plan", "MODEL", "--gpus", "1", "--config", "tiny_sudoku"]) == 0
    assert main(["plan", "MODEL"]) == 0
    assert Path(told[0].config).samefile(ROOT / "recipes" / "tiny_sudoku.yaml")
    assert told[0].gpus == 1 and told[1].config is None


def test_view(capsys, tmp_path):
    spec = SPECS["block-from-sequence"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    write_dataset(tmp_path / "data", tokenizer, spec, make_batch(spec), tokenizer=tiny_policy_path())
    page = tmp_path / "page.html"
    text = says(capsys, "view", str(tmp_path / "data"), "1", "--response", "1", "--output", str(page))
    assert text.startswith(f"{page}\n") and "<table" in page.read_text()


def test_completion(capsys):
    """A script of bash, asked as bash asks it: commands, options in full, choices, and no option that is refused."""
    pytest.importorskip("shtab", reason="needs the extra `completion`")
    script = says(capsys, "completion", "bash")

    def complete(*words: str) -> list[str]:
        typed = " ".join(map(shlex.quote, ("trl-diffusion", *words)))
        ask = f'COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _shtab_trl_diffusion; printf "%s\n" "${{COMPREPLY[@]}}"'
        bash = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True, cwd=ROOT)
        return bash.stdout.split()

    assert complete("ge") == ["generate"]
    assert complete("train", "--accelerate") == ["--accelerate_config"]
    assert {"--use_peft", "--use_cpu"} <= set(complete("train", "--use_")) and "--use_vllm" not in complete(
        "train", "--use_"
    )
    assert complete("train", "--task", "") == [*sorted(TASKS), "preferences"]
    assert complete("plan", "x", "--config", "reci") == ["recipes"]
    assert "completion" in complete("")


def test_completion_without_its_library(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install 'trl-diffusion[completion]'" in complains(capsys, "completion", "bash")


@pytest.mark.parametrize(
    ("text", "said"),
    [("127.0.0.1 localhost\n", "engine.yaml is no config of accelerate's"), ("distributed_type: MULTI_GPU\nnum_procs: 3\n", "unknown keys"), ("a: [\n", "engine.yaml")],
)  # fmt: skip
def test_a_file_that_is_no_engine(tmp_path, capsys, text, said):
    """It is found before processes are started."""
    (tmp_path / "engine.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["train", "--accelerate_config", str(tmp_path / "engine.yaml")])
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: argument --accelerate_config: ") and said in lines[0]
