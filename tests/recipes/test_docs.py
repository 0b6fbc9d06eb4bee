"""What the README and the documentation say can be typed in, runs, and leads somewhere."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

import trl_diffusion
from trl_diffusion import DecodingConfig, DTRPOConfig, cli
from trl_diffusion.commands import adapt, collect, evaluate, recipes_path, sft, train
from trl_diffusion.commands.dry import is_dry
from trl_diffusion.commands.parser import MACHINES, file_or_name, starting_parser
from trl_diffusion.commands.settings import TRAINING, TUNING, find_settings, given_options, keep_settings
from trl_diffusion.decoding.config import RolloutSettings
from trl_diffusion.decoding.strategies import STRATEGIES
from trl_diffusion.evaluation.run import TASK_NAMES, check_tasks
from trl_diffusion.rewards import countdown
from trl_diffusion.trainer import trackers
from trl_diffusion.utils import read_mapping


ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "benchmarks/RESULTS.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md") if "node_modules" not in path.parts),
]
UNRUNNABLE = "<!-- needs a 7B model -->\n"  # before a Python block that is compiled only
# Commands of others, which are not parsed.
FOREIGN = {"cd", "cp", "curl", "done", "echo", "export", "for", "git", "hf", "kill", "mkdir", "sbatch", "source"}
SLOW = "<!-- takes minutes -->\n"  # before a Python block that is run with fewer updates


def glob_pages(folder: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.md"))


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[tuple[str, bool]]:
    """The code blocks of a page, and whether each can be run here."""
    found = re.findall(
        rf"({re.escape(UNRUNNABLE)}|{re.escape(SLOW)})?^```{language}\n(.*?)^```",
        text_of(page),
        re.DOTALL | re.MULTILINE,
    )
    return [(shortened(code) if mark == SLOW else code, mark != UNRUNNABLE) for mark, code in found]


def shortened(code: str) -> str:
    """A training of a few updates, each of which is logged."""
    short = re.sub(r"max_steps=\d+", "max_steps=8", re.sub(r"logging_steps=\d+", "logging_steps=1", code))
    assert short != code
    return short


def commands(page: str) -> list[list[str]]:
    """The commands in the shell blocks of a page, as docs/follow.py would type them, split into words."""
    lines = recipe("docs/follow.py")["commands"](page)
    return [shlex.split(line.removesuffix("&")) for line in lines]


@pytest.fixture(autouse=True)
def all_trackers(monkeypatch):
    """Pages install the trackers that they report to."""
    monkeypatch.setattr(trackers, "_INSTALLED", {})


# ------------------------------------------------------------------------------------------------------- shell commands


@cache
def recipe(script: str) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str((ROOT / script).parent))  # as for a script that is started
        return runpy.run_path(str(ROOT / script))


class Parsed(Exception):
    """A command has read its options: nothing more is wanted of it."""


def options_of(start: Callable[[], object], monkeypatch) -> argparse.Namespace:
    """What the `argparse` parser of a command makes of its options. The command goes no further."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        raise Parsed(parse(self, *args, **kwargs))

    with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        start()
    return parsed.value.args[0]


def parse_options(command: str, options: list[str]) -> tuple:
    """What a command that `accelerate launch` starts makes of its options."""
    if command == "train":
        return train.parse([*options, "--bf16", "false"])  # the machine may have no GPU
    if command == "sft":
        return sft.parse([*options, "--bf16", "false"])
    if command == "collect":
        return collect.parse(options)
    if command == "adapt":
        return adapt.parse([*options, "--bf16", "false"])
    args = evaluate.parse(options)
    local = {"sudoku", "countdown"} & set(args.tasks)
    check_tasks(
        [task for task in args.tasks if task in {*TASK_NAMES} - local] or ["gsm8k"], None, args.allow_code_execution
    )
    DecodingConfig.from_dict(read_mapping(args.decoding, "decoding"))
    return (args,)


LAUNCHERS = {
    "recipes/train.py": "train",
    "recipes/sft.py": "sft",
    "recipes/adapt.py": "adapt",
    "recipes/collect.py": "collect",
    "recipes/eval.py": "evaluate",
}


def parse_script(script: str, options: list[str], monkeypatch) -> tuple:
    """What a script makes of its command line."""
    if script in LAUNCHERS:
        assert recipe(script)["main"].__module__ == f"trl_diffusion.commands.{LAUNCHERS[script]}"
        return parse_options(LAUNCHERS[script], options)
    scope = recipe(script)
    monkeypatch.setattr(sys, "argv", [script, *options])
    return (options_of(scope["main"], monkeypatch),)


def check_install(words: list[str]) -> None:
    """`pip` is not run, but what it is asked for is there."""
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    for index, word in enumerate(words):
        if word == "-c":
            assert (ROOT / words[index + 1]).is_file(), words
        if word.startswith(".["):
            assert set(word[2:-1].split(",")) <= set(extras), words


def check_module(module: str, options: list[str]) -> None:
    if module == "venv":
        return
    assert module == "trl_diffusion.evaluation", module
    check_harness(options)


def check_harness(options: list[str]) -> None:
    harness = pytest.importorskip("lm_eval._cli", reason="needs the extra `eval`")
    arguments = harness.HarnessCLI()._parser.parse_args(["run", *options])
    assert arguments.model == "trl_diffusion"


def check_command_line(options: list[str], monkeypatch) -> None:
    started: list[list[str]] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "execve", lambda path, words, environment: started.append(words))
        if options[0] in cli.DIRECT:
            options_of(lambda: cli.main(options), monkeypatch)
        elif is_dry(options):
            own, rest = starting_parser(options[0]).parse_own_args(options[1:])
            parse_options(options[0], [*(["--config", own.config] if own.config else []), *rest])
        elif options != ["--help"]:
            cli.main(options)
    for words in started:
        launch = launch_command_parser().parse_args(words[words.index("trl_diffusion.commands.launch") + 1 :])
        module, _, name = launch.training_script.rpartition(".")
        assert launch.module and module == "trl_diffusion.commands"
        parse_options(name, launch.training_script_args)


def check(words: list[str], monkeypatch) -> None:
    """Has a command parsed by what it starts."""
    first, rest = words[0], words[1:]
    if first in FOREIGN or re.match(r"\w+=", first):
        return
    if first == "pip":
        check_install(rest)
    elif first == "make":
        targets = re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE)
        assert rest and all(word in targets or word.startswith("ARGS=") for word in rest), words
    elif first == "lm_eval":
        check_harness(rest)
    elif words[:2] == ["python", "-m"]:
        check_module(words[2], words[3:])
    elif first == "python":
        parse_script(rest[0], rest[1:], monkeypatch)
    elif words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        assert launch.config_file is None or (ROOT / launch.config_file).is_file(), words
        parse_script(launch.training_script, launch.training_script_args, monkeypatch)
    elif first == "trl-diffusion":
        check_command_line(rest, monkeypatch)
    else:
        raise AssertionError(f"nobody knows what this starts: {' '.join(words)}")


def test_commands_are_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    for page in PAGES:
        for words in commands(page):
            try:
                check(words, monkeypatch)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{page}: {' '.join(words)}") from error


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "pip install .[nothing]",
        "trl-diffusion plan MODEL --no_such_option 1",
        "accelerate launch --config_file recipes/accelerate/zero9.yaml recipes/train.py",
        "accelerate launch recipes/train.py --no_such_option 1",
        "python recipes/gsm8k_preferences.py",
        "lm_eval --model hf --tasks gsm8k",
        "trl-diffuse train",
        "trl-diffusion train --no_such_option 1",
        "trl-diffusion view",
    ],
)
def test_mistakes_would_be_found(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        check(shlex.split(line), monkeypatch)


def test_reproduction_is_complete(monkeypatch):
    """Each of the three models is measured before and after, on all that the paper's table has, and trained on pairs."""
    monkeypatch.chdir(ROOT)
    found = [words for words in commands("docs/reproduce.md") if "recipes/eval.py" in words]
    for model in (
        "Efficient-Large-Model/Fast_dLLM_v2_7B",
        "GSAI-ML/LLaDA-8B-Instruct",
        "Dream-org/Dream-v0-Instruct-7B",
    ):
        before, after = (words for words in found if model in words)
        for words in (before, after):
            assert {"gpqa", "gsm8k", "math", "humaneval_plus", "ifeval"} <= set(words)
            assert words[words.index("--decoding") + 1] == before[before.index("--decoding") + 1]
        assert "--adapter_name_or_path" in after and "--adapter_name_or_path" not in before
    trained = [words for words in commands("docs/reproduce.md") if "recipes/train.py" in words]
    assert len(trained) == 3
    for words in trained:
        script, args, _ = parse_script("recipes/train.py", words[words.index("recipes/train.py") + 1 :], monkeypatch)
        assert script.trajectories and args.loss_type == "dpo"


# --------------------------------------------------------------------------------------------------------- Python blocks


def check_decoding(names: dict) -> None:
    assert len(names["answers"].texts) == 1
    assert names["batch"].steps[0, :6].tolist() == sorted(names["batch"].steps[0, :6].tolist(), reverse=True)


def check_best_checkpoint(names: dict) -> None:
    assert names["trainer"].state.best_model_checkpoint is not None


def check_strategy(names: dict) -> None:
    """More than one position goes at some step, and what goes first was the surest."""
    batch = names["batch"]
    assert 0 < int(batch.steps.max()) < 7 and names["args"].strategy == "nearly_as_sure"


def check_rising(names: dict) -> None:
    """The mean reward of the last updates is above that of the first ones, by more than a tenth."""
    rewards = [entry["reward"] for entry in names["trainer"].state.log_history if "reward" in entry]
    half = len(rewards) // 2
    assert half > 1 and sum(rewards[-half:]) > 1.1 * sum(rewards[:half]), rewards


def check_preferences(names: dict) -> None:
    """The better response of more pairs becomes likelier, compared with the worse one."""
    margins = [entry["rewards/margins"] for entry in names["trainer"].state.log_history if "rewards/margins" in entry]
    assert margins[-1] > margins[0], margins


def check_sorting(names: dict) -> None:
    """The page shows the functions of the file that its commands name."""
    shown, file = names, runpy.run_path(str(ROOT / "recipes" / "sort_digits.py"))
    (one,), (other,) = (
        scope["make_task"](1, 1, 0).train.map(lambda row: {"prompt": row["prompt"]}).to_list()
        for scope in (shown, file)
    )
    assert one == other and shown["right_places"](["1243"], ["1234"]) == file["right_places"](["1243"], ["1234"]) == [
        0.5
    ]
    code = "".join(text_of("docs/howto/own_data.md").split())
    source = "".join((ROOT / "recipes" / "sort_digits.py").read_text().partition("def right_places")[2].split())
    for part in source.split("def")[1:]:
        assert part in code, part


AFTERWARDS: dict[str, Callable[[dict], None]] = {
    "docs/decoding.md": check_decoding,
    "docs/evaluation.md": check_best_checkpoint,
    "docs/howto/lora.md": check_rising,
    "docs/howto/own_data.md": check_sorting,
    "docs/howto/preferences.md": check_preferences,
    "docs/howto/strategy.md": check_strategy,
    "docs/quickstart.md": check_rising,
}
# The README trains on what the how-to collects. That page is run here, too.
TOGETHER = {"README.md": ["docs/howto/offline.md", "README.md"]}
RUN = [page for page in PAGES if blocks(page, "python") and page != "docs/howto/offline.md"]


@pytest.mark.parametrize("page", RUN)
def test_python_runs_as_printed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = dict(STRATEGIES)
    try:
        for name in TOGETHER.get(page, [page]):
            run_blocks(name)
            if name != page:
                os.rename("outputs/few_trajectories", "outputs/trajectories")
    finally:  # a page adds one of its own
        STRATEGIES.clear()
        STRATEGIES.update(known)


def run_blocks(page: str) -> None:
    """Runs the Python blocks of a page, as docs/follow.py does: a training that moves no weight, or whose log shows that nothing
    was learnt, is an error."""
    names: dict = {}
    runnable = [code for code, runs in blocks(page, "python") if runs]
    with recipe("docs/follow.py")["watched_trainers"]() as trained:
        for code in runnable:
            exec(compile(code, page, "exec"), names)
    assert len(trained) == sum(code.count("trainer.train()") for code in runnable)
    if page in AFTERWARDS:
        AFTERWARDS[page](names)


def test_python_that_needs_a_large_model_is_right_as_far_as_can_be_seen():
    """It compiles, its imports resolve, and the options it names exist."""
    unrunnable = [code for page in PAGES for code, runs in blocks(page, "python") if not runs]
    assert unrunnable
    for code in unrunnable:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), node.module
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "DTRPOConfig":
                names = {keyword.arg for keyword in node.keywords}
                assert names <= set(DTRPOConfig.__dataclass_fields__), names


# -------------------------------------------------------------------------------------------------- directories


# Options that say how a run is started, and not what it writes.
STARTS = {"output_dir", "resume_from_checkpoint", "ds3_gather_for_generation"}


def what_writes(page: str) -> list[tuple[str, str]]:
    """The directories that the examples of a page write, each with what writes it there."""
    found = []
    for words in commands(page):
        if is_dry(words):  # which writes nothing
            continue
        scripts = {"recipes/train.py": "train", "recipes/sft.py": "sft", "recipes/collect.py": "collect"}
        name = next(
            (one for at, one in enumerate(words) if one in scripts or (at == 1 and words[0] == "trl-diffusion")), ""
        )
        options = words[words.index(name) + 1 :] if name else []
        name = scripts.get(name, name)
        if name in ("train", "sft"):
            options = without(options, "--accelerate_config", "--num_processes", *(f"--{name}" for name in MACHINES))
            if "--config" in options:
                at = options.index("--config") + 1
                options[at] = file_or_name(recipes_path())(options[at])
            settings = find_settings(options, TUNING if name == "sft" else TRAINING)
            given = {key: str(value) for key, value in settings.options.items() if key != "config"}
            command = sorted((key, value) for key, value in given.items() if key not in STARTS)
            directory = given_options(settings.arguments).get("output_dir") or given["output_dir"]
            found.append((str(directory), f"{name} {command}"))
        elif name == "collect":
            args, model = parse_options("collect", options)
            found.append((args.output_dir, f"collect {args} {model.model_name_or_path}"))
    for code, _ in [*blocks(page, "python"), *blocks(page, "diff")]:
        kept = "\n".join(line for line in code.splitlines() if not line.startswith("-"))
        kept = re.sub(r'(?:load_trajectories|from_pretrained)\(\s*"[^"]*"', "", kept)
        found += [(path, code) for path in re.findall(r'"(outputs/\w+)"', kept)]
    return found


def without(words: list[str], *options: str) -> list[str]:
    """A command line without some options, each of which has a value."""
    at = {place for place, word in enumerate(words) if word in options}
    return [word for place, word in enumerate(words) if place not in at and place - 1 not in at]


def test_every_example_has_a_directory_of_its_own(tmp_path, monkeypatch):
    """Somebody who follows all pages writes no policy over another one."""
    monkeypatch.chdir(tmp_path)
    keep_settings({}, "outputs/tiny_sudoku")  # the quick start goes on from it
    writers: dict[str, set[tuple[str, str]]] = {}
    for page in PAGES:
        for directory, writer in what_writes(page):
            writers.setdefault(directory.rstrip("/"), set()).add(writer)
    assert len(writers) > 20
    assert {"outputs/tiny_sudoku", "outputs/tiny_sudoku_continued", "outputs/lora", "outputs/plus"} <= set(writers)
    shared = {directory: found for directory, found in writers.items() if len(found) > 1}
    assert not shared, shared


# ------------------------------------------------------------------------------------------------------ prompts


def test_prompts_are_those_that_the_embedded_policy_knows():
    """Text that begins like one of its prompts is one, in pages, notebooks and help, and not nearly one."""
    files = [
        *(ROOT / page for page in PAGES),
        *(ROOT / "notebooks").glob("*.ipynb"),
        *(ROOT / "trl_diffusion").rglob("*.py"),
    ]
    found = [
        one
        for file in files
        for one in re.findall(r"[\"`](countdown [^\"`:\\]*)[\"`\\]", file.read_text(encoding="utf-8"))
    ]
    for prompt in found:
        if "{" in prompt:  # an f-string, which the numbers complete
            prompt = re.sub(r"\{[^}]*\}", "1", prompt.replace("{','.join(map(str, numbers))}", "1,2,3"))
        numbers, _, target = prompt.removeprefix("countdown ").partition("=")
        assert prompt == countdown.prompt([int(number) for number in numbers.split(",")], int(target)), prompt
    assert len(found) > 5


# ------------------------------------------------------------------------------------------------------ what is named


def test_options_in_the_table_exist_and_none_is_missing():
    """The table of what `DTRPOConfig` adds to TRL's config."""
    from trl import GRPOConfig

    shared = {*GRPOConfig.__dataclass_fields__, *RolloutSettings.__dataclass_fields__}  # these are on the API page
    own = set(DTRPOConfig.__dataclass_fields__) - shared
    table = text_of("docs/howto/grpo.md").split("| option |")[1]
    named = set(re.findall(r"`([a-z_]+)`", "".join(line.split("|")[1] for line in re.findall(r"^\|.*", table, re.M))))
    assert named == own


def test_names_that_pages_import_are_on_the_api_pages():
    """So is each function that is a reward. (That public names are there, is a test of the site.)"""
    listed = set(re.findall(r"^::: ([\w.]+)$", "".join(map(text_of, glob_pages("docs/api"))), re.MULTILINE))
    names = {name.rpartition(".")[2] for name in listed}
    imported = set()
    for page in PAGES:
        for code, _ in blocks(page, "python"):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("trl_diffusion"):
                    module = importlib.import_module(node.module)
                    found = {alias.name: getattr(module, alias.name) for alias in node.names}
                    imported |= {name for name, value in found.items() if callable(value)}
    assert len(imported) > 10 and imported <= names
    for path in sorted((ROOT / "trl_diffusion" / "rewards").glob("*.py")):
        module = f"trl_diffusion.rewards.{path.stem}"
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.args.args and node.args.args[0].arg == "completions":
                assert node.name.startswith("_") or f"{module}.{node.name}" in listed or node.name == "texts"


def test_tasks_in_the_table_exist():
    # Behind the names stands the number of questions; another table of this page has figures of a training.
    rows = re.findall(r"^\| (`[a-z0-9_`, ]+`) \| \d", text_of("docs/evaluation.md"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([a-z0-9_]+)`", row)}
    assert named == set(TASK_NAMES)


def test_links_and_paths_lead_somewhere():
    """Links and pictures, as the repository has them, and paths in backticks. (Anchors are checked by the build.)"""
    found = 0
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r"src=\"([^\"]+)\"", text)
        links = [link for link in links if not re.match(r"https?://|mailto:", link)]
        paths = re.findall(r"`((?:recipes|docs|trl_diffusion|tests|benchmarks)/[^`\s]*)`", text)
        places = [(ROOT / page).parent / link for link in links] + [ROOT / path.split("::")[0] for path in paths]
        assert all(place.exists() for place in places), (page, [str(p) for p in places if not p.exists()])
        found += len(places)
    assert found > 150


@cache
def functions_of(path: str) -> set[str]:
    return {node.name for node in ast.parse(text_of(path)).body if isinstance(node, ast.FunctionDef)}


def complaints() -> dict[str, list[str]]:
    """The complaints of docs/troubleshooting.md, and the tests that show what is done about each."""
    return read_mapping(str(ROOT / "tests/recipes/complaints.yaml"), "complaints")


def test_tests_that_are_named_exist():
    texts = [text_of(page) for page in PAGES]
    texts += [f"`{test}`" for tests in complaints().values() for test in tests]
    named = {pair for text in texts for pair in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)}
    assert len(named) > 40
    missing = [f"{path}::{name}" for path, name in named if name not in functions_of(path)]
    assert not missing, missing


def test_every_complaint_has_a_test():
    """Each row of the table says what is done, or that nothing is. Tests that show it are not on the page of users."""
    page = text_of("docs/troubleshooting.md")
    rows = [row.strip("| ").split(" | ") for row in page.split("| symptom |")[1].strip().splitlines()[2:]]
    assert len(rows) > 30 and all(len(row) == 2 for row in rows)
    assert [symptom for symptom, _ in rows] == list(complaints())
    assert all(tests and all("::" in test for test in tests) for tests in complaints().values())
    assert "tests/" not in page


def test_every_concept_has_one_file():
    """Each part of the method has a file in the map, no file is there twice, and files that cite a part are in the map."""
    rows = re.findall(
        r"^\| (\d) .*? \| `(trl_diffusion/[\w/]+\.py)` \|$", text_of("docs/architecture.md"), re.MULTILINE
    )
    files = [path for _, path in rows]
    assert len(files) == len(set(files)) and all((ROOT / path).is_file() for path in files)
    assert {number for number, _ in rows} == set("123456789")
    citing = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "trl_diffusion").rglob("*.py")
        if "docs/method.md" in path.read_text()
    }
    settings = {"trl_diffusion/trainer/config.py", "trl_diffusion/decoding/config.py"}  # which have an option for each
    assert citing - set(files) <= settings


def test_pictures_can_be_drawn_again(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra `viz`")
    scope = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    monkeypatch.setitem(scope["main"].__globals__, "PICTURES", tmp_path)
    find = scope["find_puzzle"]

    def first_and_last(before, after):  # of the frames, each of which takes a second
        puzzle, *both = find(before, after)
        return puzzle, *([frames[0], frames[-1]] for frames in both)

    monkeypatch.setitem(scope["main"].__globals__, "find_puzzle", first_and_last)
    (tmp_path / "trainer_state.json").write_text(
        '{"log_history": [{"step": 1, "reward": 0.5, "rewards/a/mean": 0.5}]}'
    )
    shutil.copytree(trl_diffusion.tiny_policy_path(), tmp_path, dirs_exist_ok=True)  # what a run leaves, untrained
    scope["main"]([str(tmp_path)])
    kinds = (".png", ".gif", ".svg")
    drawn, kept = (
        {path.name for path in folder.iterdir() if path.suffix in kinds}
        for folder in (tmp_path, ROOT / "docs" / "pictures")
    )
    assert drawn == kept
    assert all(path.stat().st_size < 100_000 for path in (ROOT / "docs" / "pictures").iterdir())


def test_the_moving_picture_shows_each_step(tmp_path):
    """Every digit comes once and stays, two at a step, and the last picture stays longest. Digits that are repeated are in
    conflict, and so is one that is not the puzzle's."""
    image = pytest.importorskip("PIL.Image", reason="needs the extra `viz`")
    scope = recipe("docs/pictures.py")
    policy = scope["open_policy"](trl_diffusion.tiny_policy_path())
    (frames,) = scope["denoise_puzzles"](policy, ["3100243010040003"])
    masks = [frame.count(".") for frame in frames]
    assert masks[0] == 16 and masks[-1] == 0 and all(0 <= a - b <= 2 for a, b in zip(masks, masks[1:], strict=False))
    assert all(
        a in (b, ".") for one, other in zip(frames, frames[1:], strict=False) for a, b in zip(one, other, strict=True)
    )
    assert scope["conflicts"]("0" * 16, "1234341221434321") == set()
    assert scope["conflicts"]("2" + "0" * 15, "1234341221434321") == {0}
    assert scope["conflicts"]("0" * 16, "1134341221434321") == {0, 1, 9}
    with image.open(ROOT / "docs" / "pictures" / "before_after.gif") as picture:
        durations = []
        for frame in range(picture.n_frames):
            picture.seek(frame)
            durations.append(picture.info["duration"])
    assert picture.n_frames == len(frames) and max(durations) == durations[-1]
