"""
Wrong inputs: each is answered by one line that names the file, the row or the option, says what was found and what to do,
before anything is computed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, Trainer

from tests.viz.test_viewer import make_batch, write_dataset
from trl_diffusion import DTRPOConfig, DTRPOTrainer, get_spec, load_trajectories, tiny_policy_path
from trl_diffusion.commands import collect, evaluate, generate, iterate, plan, train, view
from trl_diffusion.decoding.loop import DenoisingLoop
from trl_diffusion.rewards.call import RewardCaller
from trl_diffusion.trainer.checkpoints import mark_complete, only_training_in
from trl_diffusion.utils import TEMPORARY, check_writable, errors_in_a_line, exit_code


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
GAME = {"numbers": [1, 2, 3], "target": 6}
PUZZLE = "3102200002100320"


def forbid_computing(monkeypatch) -> None:
    def computed(*args, **options):
        raise AssertionError("something was computed")

    monkeypatch.setattr(DenoisingLoop, "run", computed)
    monkeypatch.setattr(Trainer, "train", computed)
    monkeypatch.setattr(Trainer, "evaluate", computed)


@dataclass(frozen=True)
class Case:
    """
    A wrong input.

    Attributes:
        run (`Callable`): starts what takes it, in a directory of its own.
        message (`str`): regular expression of the line.
        make (`Callable`, *optional*): writes the files.
    """

    run: Callable[[Path], object]
    message: str
    make: Callable[[Path], object] = lambda path: None


def command(module, *words: str) -> Callable[[Path], object]:
    return lambda path: module.main(list(words))


def writes(name: str, content: str | bytes) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def model(name: str, change: Callable[[bytes], bytes] | bytes) -> Callable[[Path], object]:
    """The embedded policy as `model/`, one file of it changed."""

    def write(path: Path) -> None:
        shutil.copytree(tiny_policy_path(), path / "model")
        file = path / "model" / name
        file.write_bytes(change if isinstance(change, bytes) else change(file.read_bytes()))

    return write


def with_index(content: str) -> Callable[[Path], object]:
    """The embedded policy as `model/`, with an index of shards."""

    def write(path: Path) -> None:
        shutil.copytree(tiny_policy_path(), path / "model")
        writes("model/model.safetensors.index.json", content)(path)

    return write


def adapter(name: str, content: bytes) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        config = {"peft_type": "LORA", "base_model_name_or_path": tiny_policy_path(), "target_modules": ["q_proj"]}
        writes("adapter/adapter_config.json", json.dumps(config))(path)
        writes(f"adapter/{name}", content)(path)

    return write


def stored(**changes: str) -> Callable[[Path], object]:
    """Trajectories in `data/`, with other files beside them."""

    def write(path: Path) -> None:
        spec = get_spec(AutoConfig.from_pretrained(tiny_policy_path()))
        tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
        write_dataset(path / "data", tokenizer, spec, make_batch(spec))
        for name, content in changes.items():
            (path / "data" / name.replace("__", ".")).write_text(content)

    return write


def measured(change: Callable[[dict], object] | str) -> Callable[[Path], object]:
    """What an evaluation has left in `out/`, changed."""
    whole = {
        "task": "sudoku", "seed": 0, "settings": {}, "questions": 1, "skipped": 0, "accuracy": 1.0, "answers": 1, "tokens": 1,
        "forwards": 1, "seconds": 1.0,
    }  # fmt: skip

    def write(path: Path) -> None:
        writes("sudoku/4x4_test.csv", f"Puzzle\n{PUZZLE}\n")(path)
        content = change if isinstance(change, str) else json.dumps(change(dict(whole)))
        writes("out/sudoku_seed0.json", content)(path)

    return write


def rounds(name: str, content: str) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        writes("rounds.yaml", "collect: {train_size: 4}\ntrain: {max_steps: 1}\nrounds: 1\noutput_dir: run\n")(path)
        writes(name, content)(path)

    return write


def checkpoint(path: Path) -> None:
    """A checkpoint in `out/` that lacks its optimizer."""
    folder = path / "out" / "checkpoint-5"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"global_step": 5}')
    torch.save({}, folder / "rng_state.pth")
    mark_complete(folder)


def blocked(path: Path) -> None:
    """A file where a directory is needed."""
    (path / "taken").write_text("")


def train_rows(name: str, task: str = "countdown") -> Callable[[Path], object]:
    return command(train, "--task", task, "--train_file", name, "--output_dir", "out")


def on_stored(**options) -> Callable[[Path], object]:
    """Training on stored responses."""

    def start(path: Path) -> None:
        with errors_in_a_line():
            DTRPOTrainer(
                tiny_policy_path(),
                args=DTRPOConfig("out", bf16=False, num_generations=2, per_device_train_batch_size=2, **options),
                train_dataset=load_trajectories("data"),
            )

    return start


def on_prompts(size: int, bad, template: str | None = None) -> Callable[[Path], object]:
    """Training on prompts of which the last is wrong."""

    def start(path: Path) -> None:
        good = "1+1=" if isinstance(bad, str) else [{"role": "user", "content": "1+1="}]
        prompts = Dataset.from_dict({"prompt": [good] * (size - 1) + [bad]})
        tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left")
        tokenizer.chat_template = template
        with errors_in_a_line():
            DTRPOTrainer(
                tiny_policy_path(), lambda completions, **_: [0.0] * len(completions),
                DTRPOConfig("out", bf16=False, max_completion_length=8, report_to="none"), prompts, processing_class=tokenizer,
            )  # fmt: skip

    return start


EVALUATE = ("--tasks", "sudoku", "--data_dir", ".", "--output_dir", "out")
TINY = ("--config", "options.yaml")
RUNS = command(iterate, "--config", "rounds.yaml")
CASES = {
    # Directories that cannot be written to.
    "train into a file": Case(
        command(train, "--output_dir", "taken"), r"Nothing can be written to taken .*Choose another `--output_dir`", blocked
    ),
    "train below a file": Case(
        command(train, "--output_dir", "taken/out"), r"Nothing can be written to taken/out .*Not a directory", blocked
    ),
    "collect": Case(
        command(collect, "--output_dir", "taken/out"), r"Nothing can be written to taken/out .*`--output_dir`", blocked
    ),
    "evaluate": Case(
        command(evaluate, "--tasks", "gsm8k", "--output_dir", "taken"), r"Nothing can be written to taken ", blocked
    ),
    "iterate": Case(
        command(iterate, "--output_dir", "taken/out"), r"Nothing can be written to taken/out .*`output_dir`", blocked
    ),
    "view": Case(
        command(view, "data", "0", "--output", "data/README.txt/page.html"), r"Nothing can be written to .*`--output`",
        stored(README__txt=""),
    ),
    # Checkpoints.
    "weights are a pointer": Case(
        command(generate, "x", "--model", "model"), r"model/model.safetensors is a pointer of Git LFS.*`git lfs pull`",
        model("model.safetensors", POINTER),
    ),
    "weights are cut off": Case(
        command(train, "--model_name_or_path", "model", "--output_dir", "out", "--bf16", "false"),
        r"model/model.safetensors has \d+ bytes, and its header says \d+.*Fetch it again",
        model("model.safetensors", lambda content: content[:-100]),
    ),
    "weights are cut off in their header": Case(
        command(collect, "--model_name_or_path", "model", "--output_dir", "out"),
        r"model/model.safetensors holds no weights .*cut off.*Fetch it again",
        model("model.safetensors", lambda content: content[:100]),
    ),
    "weights are empty": Case(
        command(evaluate, *EVALUATE, "--model_name_or_path", "model"), r"model/model.safetensors is empty. Fetch it again",
        lambda path: (model("model.safetensors", b"")(path), measured(dict)(path)),
    ),
    "weights are no safetensors": Case(
        command(generate, "x", "--model", "model"), r"model/model.safetensors holds no weights",
        model("model.safetensors", b"\x10" + bytes(7) + b"[1, 2, 3, 4, 5 ]"),
    ),
    "a shard is missing": Case(
        command(generate, "x", "--model", "model"), r"index.json names \['model-2.safetensors'\], which model does not have",
        with_index('{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'),
    ),
    "an index lacks its map": Case(
        command(generate, "x", "--model", "model"), r"index.json lacks \['weight_map'\]; it has \['metadata'\]",
        with_index('{"metadata": {}}'),
    ),
    "an index of another shape": Case(
        command(generate, "x", "--model", "model"), r"index.json: `weight_map` must name a file for each weight",
        with_index('{"weight_map": ["model.safetensors"]}'),
    ),
    "config is a pointer": Case(
        command(plan, "model"), r"model/config.json is a pointer of Git LFS", model("config.json", POINTER)
    ),
    "config is a list": Case(
        command(plan, "model"), r"model/config.json must hold a JSON object, got \[1\]. Fetch it again",
        model("config.json", b"[1]"),
    ),
    "config is cut off": Case(
        command(generate, "x", "--model", "model"), r"model/config.json is not JSON \(", model("config.json", b'{"a": ')
    ),
    "config is in another encoding": Case(
        command(generate, "x", "--model", "model"), r"model/config.json is not UTF-8 .*Save it as UTF-8",
        model("config.json", '{"a": "é"}'.encode("latin-1")),
    ),
    "tokenizer is empty": Case(
        command(generate, "x", "--tokenizer", "model"), r"model/tokenizer.json is empty", model("tokenizer.json", b"")
    ),
    "tokenizer of another shape": Case(
        command(generate, "x", "--tokenizer", "model"), r"The tokenizer of model cannot be read \(.*pass another tokenizer",
        model("tokenizer.json", b'{"version": 1}'),
    ),
    "tokenizer config is a list": Case(
        command(train, "--tokenizer_name_or_path", "model", "--output_dir", "out", "--bf16", "false"),
        r"model/tokenizer_config.json must hold a JSON object, got \[\]", model("tokenizer_config.json", b"[]"),
    ),
    "adapter is a pointer": Case(
        command(generate, "x", "--adapter", "adapter"), r"adapter/adapter_model.safetensors is a pointer of Git LFS",
        adapter("adapter_model.safetensors", POINTER),
    ),
    "adapter config is text": Case(
        command(generate, "x", "--adapter", "adapter"), r"adapter/adapter_config.json must hold a JSON object, got 'LORA'",
        adapter("adapter_config.json", b'"LORA"'),
    ),
    "adapter of no kind": Case(
        command(generate, "x", "--adapter", "adapter"), r"There is no adapter at adapter \(KeyError: .*NONE",
        adapter("adapter_config.json", b'{"peft_type": "NONE"}'),
    ),
    "a reward model is a pointer": Case(
        lambda path: exit_code(lambda: RewardCaller("model")), r"model/model.safetensors is a pointer of Git LFS",
        model("model.safetensors", POINTER),
    ),
    "a checkpoint that is not there": Case(
        command(train, "--resume_from_checkpoint", "out/checkpoint-5", "--output_dir", "out", "--bf16", "false"),
        r"out/checkpoint-5 cannot be resumed: there is no such directory. Restore it, or name another `resume_from_checkpoint`",
    ),
    "a checkpoint without its state": Case(
        command(train, "--resume_from_checkpoint", "old", "--output_dir", "out", "--bf16", "false"),
        r"old cannot be resumed: trainer_state.json is missing", writes("old/optimizer.pt", b""),
    ),
    "a checkpoint without its optimizer": Case(
        command(train, "--resume_from_checkpoint", "true", "--output_dir", "out", "--bf16", "false"),
        r"out/checkpoint-5 cannot be resumed: optimizer.pt is missing.*so that training starts anew", checkpoint,
    ),
    # Rows.
    "rows are strings": Case(
        train_rows("rows.jsonl"), r"rows.jsonl, row 1: must be an object .*got 'sudoku'",
        writes("rows.jsonl", f'{json.dumps(GAME)}\n"sudoku"\n'),
    ),
    "pairs are strings": Case(
        train_rows("rows.jsonl", "preferences"), r"rows.jsonl, row 0: must be an object", writes("rows.jsonl", '"chosen"\n')
    ),
    "pairs without a column": Case(
        train_rows("rows.jsonl", "preferences"), r"rows.jsonl, row 1: `rejected` must be text or a list of messages, got None",
        writes("rows.jsonl", '{"prompt": "1", "chosen": "2", "rejected": "3"}\n{"prompt": "1", "chosen": "2"}\n'),
    ),
    "rows in another encoding": Case(
        train_rows("rows.csv"), r"rows.csv is not UTF-8 .*Save it as UTF-8",
        writes("rows.csv", "numbers;target;né\n".encode("latin-1")),
    ),
    "rows are a pointer": Case(
        train_rows("rows.csv"), r"rows.csv is a pointer of Git LFS", writes("rows.csv", POINTER)
    ),
    "rows are cut off": Case(
        train_rows("rows.jsonl"), r"rows.jsonl, line 2: not JSON", writes("rows.jsonl", f'{json.dumps(GAME)}\n{{"numb')
    ),
    "rows of another shape": Case(
        train_rows("rows.json"), r"rows.json: must hold a list of rows, got dict", writes("rows.json", "{}")
    ),
    "a row with a value too many": Case(
        train_rows("rows.csv", "sudoku"), r"rows.csv, row 0: has more values than", writes("rows.csv", f"Puzzle;a\n{PUZZLE};1;2\n")
    ),
    "a table with a NUL": Case(
        train_rows("rows.csv", "sudoku"), r"rows.csv.*row 0: .*16 digits", writes("rows.csv", "Puzzle\n31\x0002\n")
    ),
    "a prompt with the mask token": Case(
        on_prompts(1235, "1<mask>1"), r"train_dataset: Prompt 1234 contains the mask token"
    ),
    "a role that the template does not take": Case(
        on_prompts(
            1235, [{"role": "system", "content": "1"}], template="{% for m in messages %}{% if m['role'] == 'system' %}"
            "{{ raise_exception('System role not supported') }}{% endif %}{{ m['content'] }}{% endfor %}",
        ),
        r"train_dataset: Prompt 1234: the chat template does not take a conversation of \['system'\] \(System role not supp",
    ),
    "an empty prompt": Case(on_prompts(1235, ""), r"train_dataset: row 1234 has no prompt"),
    "an answer that is a number": Case(
        train_rows("rows.jsonl", "preferences"), r"rows.jsonl, row 0: `chosen` must be text or a list of messages, got 5",
        writes("rows.jsonl", '{"prompt": "1", "chosen": 5, "rejected": "3"}\n{"prompt": "1", "chosen": "2", "rejected": "3"}\n'),
    ),
    # Options.
    "a value that is not there": Case(
        command(train, *TINY), r"options.yaml: line 2: the key 'learning_rate' has no value. Write one",
        writes("options.yaml", "output_dir: out\nlearning_rate:\n"),
    ),
    "a value that is not there, in a section": Case(
        RUNS, r"rounds.yaml: line 1: the key 'seed' has no value", rounds("rounds.yaml", "collect: {seed: }\n")
    ),
    "a list of options": Case(
        command(collect, *TINY), r"options.yaml must hold options, each as `name: value`, got \['seed'\]",
        writes("options.yaml", "- seed\n"),
    ),
    "an empty file of options": Case(
        command(evaluate, *TINY), r"options.yaml must hold options, .*got None", writes("options.yaml", "")
    ),
    "options in another encoding": Case(
        command(train, *TINY), r"options.yaml is not UTF-8", writes("options.yaml", b"output_dir: \xff\n")
    ),
    "no path of options": Case(command(train, "--config"), r"--config is followed by no path"),
    "options that are no YAML": Case(
        command(train, *TINY), r"options.yaml: line 2: mapping values are not allowed", writes("options.yaml", "a: 1\n  b: [\n")
    ),
    "an unknown option": Case(
        command(train, *TINY), r"options.yaml: unknown options \['learning_rates'\]; --help lists .*meant to be learning_rate\?", writes("options.yaml", "learning_rates: 1\n")
    ),
    "an option of another kind": Case(
        command(train, *TINY), r"`train_file` must be text, got 3", writes("options.yaml", "train_file: 3\noutput_dir: out\n")
    ),
    "a learning rate that is no number": Case(
        command(train, "--learning_rate", "nan", "--output_dir", "out", "--bf16", "false"),
        r"`learning_rate` must be a number of at least 0 and finite, got nan",
    ),
    "a learning rate of null": Case(
        command(train, *TINY), r"`learning_rate` must be a number", writes("options.yaml", "learning_rate: null\noutput_dir: out\n")
    ),
    "several options at once": Case(
        command(train, "--output_dir", "out", "--bf16", "false", "--top_p", "0.9", "--use_vllm"),
        r"cannot be used with a diffusion policy: - `use_vllm`.*- `top_p`: tokens would be scored under another distribution",
    ),
    "no batch": Case(command(evaluate, *EVALUATE, "--batch_size", "0"), r"`batch_size` must be a whole number of at least 1"),
    "a seed twice": Case(command(evaluate, *EVALUATE, "--seeds", "1", "1"), r"`seeds` must be different numbers"),
    "a decoding of another shape": Case(
        command(evaluate, *EVALUATE, "--decoding", "decoding.json"), r"`decoding` must be like name:value",
        lambda path: (writes("decoding.json", "[1]")(path), measured(dict)(path)),
    ),
    "a spec of another shape": Case(
        command(generate, "x", "--diffusion_spec", '{"block_size": "8"}'), r"`block_size` must be a whole number .*got '8'"
    ),
    "a random policy of another shape": Case(
        command(train, "--random_policy", "[1]", "--tokenizer_name_or_path", tiny_policy_path(), "--output_dir", "out", "--bf16", "false"),
        r"`random_policy` must be",
    ),
    "template variables of another shape": Case(
        command(collect, "--chat_template_kwargs", "[1]", "--output_dir", "out"), r"`chat_template_kwargs` must be like name:value"
    ),
    "too many weights of rewards": Case(
        on_stored(temperature=0.5, reward_weights=[1.0, 2.0, 3.0]), r"`reward_weights` holds 3 weights, but train_dataset has the rewards", stored()
    ),
    "several greedy responses": Case(
        command(collect, "--temperature", "0", "--output_dir", "out"), r"16 responses to a prompt are all the same at temperature 0"
    ),
    "several greedy responses in rounds": Case(
        RUNS, r"16 responses to a prompt are all the same at temperature 0. Set `temperature` to 1.0",
        rounds("rounds.yaml", "output_dir: run\ncollect: {temperature: 0}\n"),
    ),
    "two ways to say how many tokens a step unmasks": Case(
        command(train, "--steps_per_block", "4", "--output_dir", "out", "--bf16", "false"),
        r"`tokens_per_step=2` and `steps_per_block=4` both say",
    ),
    # What earlier commands have left.
    "a measurement is cut off": Case(
        command(evaluate, *EVALUATE), r"out/sudoku_seed0.json is not JSON .*Delete it to have it measured again",
        measured('{"task": '),
    ),
    "a measurement is a list": Case(
        command(evaluate, *EVALUATE), r"out/sudoku_seed0.json must hold a JSON object, got \[\]", measured("[]")
    ),
    "a measurement lacks something": Case(
        command(evaluate, *EVALUATE), r"out/sudoku_seed0.json lacks \['accuracy'\]; it has .*Delete it",
        measured(lambda whole: {name: value for name, value in whole.items() if name != "accuracy"}),
    ),
    "settings of a measurement are text": Case(
        command(evaluate, *EVALUATE), r"sudoku_seed0.json: `settings` must be an object", measured(lambda whole: {**whole, "settings": "x"})
    ),
    "a measurement is empty": Case(
        command(evaluate, *EVALUATE), r"out/sudoku_seed0.json is not JSON \(it is empty\)", measured("")
    ),
    "the plan of a collection is a list": Case(
        command(collect, "--output_dir", "data"), r"data/collection.json must hold a JSON object.*Use another `output_dir`",
        stored(collection__json="[1]"),
    ),
    "the plan of stored trajectories is damaged": Case(
        command(train, "--trajectories", "data", "--output_dir", "out", "--bf16", "false"), r"data/collection.json is not JSON",
        stored(collection__json="{"),
    ),
    "the plan of stored trajectories lacks something": Case(
        command(train, "--trajectories", "data", "--output_dir", "out", "--bf16", "false"),
        r"data/collection.json lacks \['num_shards'\]", stored(collection__json="{}"),
    ),
    "a plan that the viewer reads": Case(
        command(view, "data", "0"), r"data/collection.json must hold a JSON object, got 'x'. Pass --tokenizer",
        stored(collection__json='"x"'),
    ),
    "a round with a learning rate that is no number": Case(
        RUNS, r"`learning_rate` must be a number of at least 0 and finite, got nan",
        rounds("rounds.yaml", "output_dir: run\ntrain: {learning_rate: .nan}\n"),
    ),
    "a round with too small a group": Case(
        RUNS, r"`num_generations` must be a whole number of at least 2, got 1",
        rounds("rounds.yaml", "output_dir: run\ntrain: {num_generations: 1, learning_rate: 1e-4}\n"),
    ),
    "a round with an unknown option": Case(
        RUNS, r"`train`: unknown options \['learning_rates'\].* Is learning_rates meant to be learning_rate\?",
        rounds("rounds.yaml", "output_dir: run\ntrain: {learning_rates: 1}\n"),
    ),
    "a round that collects nothing": Case(
        RUNS, r"`num_responses` must be a whole number of at least 1, got 0",
        rounds("rounds.yaml", "output_dir: run\ncollect: {num_responses: 0}\n"),
    ),
    "results of a round are cut off": Case(
        RUNS, r"run/round_1/policy/results.json is not JSON .*Delete it to have the round trained again",
        rounds("run/round_1/policy/results.json", '{"solve'),
    ),
    "results of a round lack something": Case(
        RUNS, r"run/round_1/policy/results.json lacks \['solve_rate_after'\]",
        rounds("run/round_1/policy/results.json", '{"solve_rate_before": 0.1}'),
    ),
    "the plan of rounds is a list": Case(
        RUNS, r"run/iterate.json must hold a JSON object, got \[\]", rounds("run/iterate.json", "[]")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_wrong_inputs_are_answered_by_a_line(name, tmp_path, monkeypatch, capsys):
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    case.make(tmp_path)
    forbid_computing(monkeypatch)
    try:
        code = case.run(tmp_path)
    except SystemExit as end:
        code = end.code
    assert code == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1 and err.rstrip().splitlines()[-1] == lines[0] and "Traceback" not in err + out, err
    assert re.search(case.message, lines[0]), lines[0]
    assert not list(tmp_path.rglob(f"{TEMPORARY}*"))  # no file is half written


def test_a_directory_where_another_training_runs(tmp_path, monkeypatch, capsys):
    forbid_computing(monkeypatch)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    with only_training_in(tmp_path), pytest.raises(SystemExit) as end:
        train.main(["--output_dir", str(tmp_path), "--bf16", "false"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: Another training is going on in {tmp_path} (process ")


@pytest.mark.parametrize("value", ["0", "-1", "two", ""])
def test_a_number_of_processes_that_cannot_be(value, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    for module in (train, collect, evaluate):
        with pytest.raises(SystemExit):
            module.main(["--output_dir", str(tmp_path / "out")])
        message = (
            f"error: The environment variable LOCAL_WORLD_SIZE must be a whole number of at least 1, got {value!r}"
        )
        assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_two_processes_may_look_at_the_same_directory(tmp_path, monkeypatch):
    """What one of them has written to try it may be cleared away by the other, as rubbish of an earlier run."""
    close = os.close

    def clear_and_close(descriptor):
        for rest in tmp_path.glob(f"{TEMPORARY}*"):
            rest.unlink()
        close(descriptor)

    monkeypatch.setattr(os, "close", clear_and_close)
    check_writable(tmp_path / "collected", "output_dir")
    assert not list(tmp_path.iterdir())
