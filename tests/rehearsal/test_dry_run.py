"""Planted mistakes: a dry run names each of them, and several at once. Nothing is computed and nothing is left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from tests.test_wrong_inputs import forbid_computing, stored
from trl_diffusion import cli, tiny_policy_path
from trl_diffusion.commands import collect, iterate, sft, train
from trl_diffusion.decoding.loop import DenoisingLoop
from trl_diffusion.plan import fit
from trl_diffusion.plan.simulate import Footprint


RUN = DenoisingLoop.run
SMALL = ["--train_size", "8", "--eval_size", "4", "--per_device_train_batch_size", "4", "--num_generations", "2"]

SHORT = ["--bf16", "false", "--max_completion_length", "17"]
FOOTPRINT = Footprint(
    parameters=670_000, trainable=670_000, linear=500_000, experts=0, used_experts=0, weights=2**28, gradients=2**28, optimizer=2**29,
    activations=2**30, rollout=2**28, cache=2**20, packed_tokens=100, scored_tokens=10, logits=4000, largest_layer=2**20,
    score_flops=10**9, update_flops=3 * 10**9,
)  # fmt: skip


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """A directory of its own, and no computing. The plan, which has tests of its own, takes seconds."""
    monkeypatch.setattr("trl_diffusion.commands.dry_needs.simulate_layers", lambda *args, **options: FOOTPRINT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    forbid_computing(monkeypatch)


@pytest.fixture
def rehearse(capsys) -> Callable[..., tuple[int, str, list[str]]]:
    """Runs a command dry. Gives its exit code, what it prints, and its mistakes."""

    def run(command=train, *words: str) -> tuple[int, str, list[str]]:
        with pytest.raises(SystemExit) as end:
            command.main([*words, "--dry_run", "--output_dir", "out"])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return end.value.code, out, [line for line in err.splitlines() if line.startswith("error: ")]

    return run


def policy(name: str = "model", weights: bool = True, **changes) -> str:
    """The embedded policy as a directory, its config changed."""
    shutil.copytree(tiny_policy_path(), name)
    config = json.loads(Path(name, "config.json").read_text())
    Path(name, "config.json").write_text(json.dumps({**config, **changes}))
    if not weights:
        Path(name, "model.safetensors").unlink()
    return name


def test_what_is_right(rehearse):
    code, out, mistakes = rehearse(train, *SMALL)
    assert (code, mistakes) == (0, []) and "Nothing was found that is wrong." in out
    for text in (
        "sudoku: 8 puzzles to train on, 4 to measure on", "sudoku_solved: 1 on average for 8 right answers", "with 17 new ones at most 40",
        "60 updates, each on 4 responses; a rollout has 4 responses to 2 prompts", "0.67 million weights",
    ):  # fmt: skip
        assert text in out
    assert re.search(r"time +not known", out) and not Path("out").exists()


def test_weights_are_not_needed(rehearse):
    code, out, mistakes = rehearse(train, "--model_name_or_path", policy(weights=False), *SHORT, *SMALL)
    assert (code, mistakes) == (0, []) and "config only; the weights are still to be put there" in out


def write_task(right: str) -> str:
    """A task whose rows have right answers, and a checker with the given body."""
    Path("task.py").write_text(
        "from datasets import Dataset\nfrom trl_diffusion.tasks import Task\n\n"
        f"def solved(completions, **_):\n    {right}\n\n"
        "def make():\n    rows = [{'prompt': f'{n}+1='} for n in range(1, 9)]\n"
        "    return Task('sums', 'sums', Dataset.from_list(rows[:6]), Dataset.from_list(rows[6:]), [solved], solved, lambda row: '2')\n"
    )
    return "task.py:make"


def test_wrong_tokenizer(rehearse):
    """One whose ids are all in the vocabulary of the policy, so that nothing would fail."""
    Path("other").mkdir()
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    text = tokenizer.backend_tokenizer.to_str()
    other = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(text.replace('"7":', '"é":'))
    )
    other.pad_token, other.eos_token = tokenizer.pad_token, tokenizer.eos_token
    other.save_pretrained("other")
    code, _, mistakes = rehearse(train, *SMALL, "--tokenizer_name_or_path", "other")
    assert code == 2
    assert any(
        "tokenizer: The tokenizer other (100 tokens) has another vocabulary than the one beside the policy (100 tokens): 1 differ, such as '7'."
        in one
        for one in mistakes
    )


def test_tokenizer_of_a_smaller_policy(rehearse):
    _, _, mistakes = rehearse(train, *SMALL, "--model_name_or_path", policy(vocab_size=300), *SHORT)
    assert (
        "error: tokenizer: The tokenizer model has 100 tokens of a policy whose vocabulary has 300: it is that of another"
        in mistakes[0]
    )


def test_reward_that_fails_on_right_answers(rehearse):
    _, _, mistakes = rehearse(train, *SMALL, "--task", write_task("return [float(one == '3') for one in completions]"))
    assert (
        len(mistakes) == 1
        and "rewards: The reward function 'solved' says that 6 of 6 right answers are not solved" in mistakes[0]
    )
    assert "it gives 0.0 for the answer '2' to '1+1='" in mistakes[0]


def test_reward_that_raises(rehearse):
    _, _, mistakes = rehearse(train, *SMALL, "--task", write_task("return [1 / len(one) for one in completions]"))
    assert (
        "rewards: The reward function 'solved' fails on an empty answer: ZeroDivisionError: division by zero"
        in mistakes[0]
    )


def test_several_mistakes_at_once(rehearse):
    """A batch that does not divide, an unsupported option, a missing file, and a directory below a file."""
    Path("out").write_text("a file")
    words = [
        "--per_device_train_batch_size",
        "3",
        "--num_generations",
        "2",
        "--top_p",
        "0.5",
        "--train_file",
        "nothing.csv",
    ]
    code, out, mistakes = rehearse(train, *words)
    assert code == 2 and "4 mistakes found." in out and len(mistakes) == 4
    for part, message in (
        ("options", "`top_p`: tokens would be scored under another distribution"),
        ("options", "generation_batch_size (3) must be divisible by num_generations (2)."),
        ("data", "There is no file nothing.csv"),
        ("output", "Nothing can be written to out"),
    ):
        assert any(one.startswith(f"error: {part}: ") and message in one for one in mistakes), message


def test_batches_of_several_processes(rehearse, capsys):
    """Three responses of each of two processes are three pairs, and of three they are none that are whole."""
    words = ["train", "--dry_run", "--output_dir", "out", "--train_size", "8", "--eval_size", "4", "--per_device_train_batch_size", "3",
             "--num_generations", "2"]  # fmt: skip
    assert cli.main([*words, "--num_processes", "2"]) == 0
    assert "each on 6 responses; a rollout has 6 responses to 3 prompts" in capsys.readouterr().out
    assert cli.main([*words, "--num_processes", "3"]) == 2
    assert (
        "error: options: generation_batch_size (9) must be divisible by num_generations (2)."
        in capsys.readouterr().err
    )
    assert cli.main([*words, "--accelerate_config", "zero3"]) == 2  # for 8 GPUs
    out, err = capsys.readouterr()
    assert "on 8 processes (zero3)" in out and "train_dataset has 8 rows, but a rollout takes 12 prompts" in err


def test_stored_responses_and_rewards_of_ones_own(rehearse, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(DenoisingLoop, "run", RUN)
        stored()(Path())
    words = [
        "--trajectories",
        "data",
        "--per_device_train_batch_size",
        "2",
        "--num_generations",
        "2",
        "--eval_size",
        "4",
    ]
    _, out, mistakes = rehearse(train, *words)
    assert "groups of stored responses to train on" in out and "4 puzzles" not in out.partition("prompts ")[2], (
        mistakes
    )
    Path("rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n}+1=", "answer": "2"}) for n in range(9)))
    Path("rewards.py").write_text(
        "def right(completions, answer, **_):\n    return [float(a == b) for a, b in zip(answer, completions)]\n"
    )
    words = ["--train_file", "rows.jsonl", "--reward_funcs", "./rewards.py:right", "--eval_size", "2"]
    code, out, mistakes = rehearse(train, *words, *SMALL[4:])
    assert (code, mistakes) == (
        0,
        [],
    ) and "right: called on an empty answer; there are no right answers to these" in out


def test_not_enough_memory_and_no_disk(rehearse, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(fit.shutil, "disk_usage", lambda path: usage)
    _, _, mistakes = rehearse(train, *SMALL, "--gpu_memory", "0.5")
    memory, disk = mistakes
    assert re.match(r"error: memory: The run needs about 3.0 GiB, more than the 0.5 GiB of `--gpu_memory`", memory)
    assert re.search(
        r"error: disk: 2 checkpoints of 0.75 GiB and the trained policy need 1.75 GiB, but only 0.00 GiB are free",
        disk,
    )


def test_no_main_memory(rehearse, monkeypatch):
    monkeypatch.setattr("trl_diffusion.commands.dry_needs.free_memory", lambda: 2**20)
    _, _, mistakes = rehearse(train, *SMALL)
    assert len(mistakes) == 1 and "more than the 0.0 GiB of main memory that are free" in mistakes[0]


def test_wrong_spec_and_mask_in_prompts(rehearse):
    _, _, mistakes = rehearse(train, *SMALL, "--diffusion_spec", '{"mask_token_id": 5000}')
    assert "error: spec: `mask_token_id` holds 5000, but the model's vocabulary has 100 tokens." in mistakes
    zero = AutoTokenizer.from_pretrained(tiny_policy_path()).convert_tokens_to_ids("0")  # empty cells of a puzzle
    _, _, mistakes = rehearse(train, *SMALL, "--diffusion_spec", json.dumps({"mask_token_id": zero}))
    assert any(
        re.search(rf"prompts: .*Prompt 0 contains the mask token \({zero}\) at position", one) for one in mistakes
    )


@pytest.mark.parametrize("option", ["dry_run: true", "gpu_memory: 80"])
def test_a_file_starts_no_dry_run(option, capsys):
    Path("options.yaml").write_text(f"task: sudoku\noutput_dir: out\nbf16: false\n{option}\n")
    with pytest.raises(SystemExit) as end:
        train.main(["--config", "options.yaml"])
    assert end.value.code == 2 and "--dry_run`" in capsys.readouterr().err and not Path("out").exists()


def test_sft(rehearse):
    code, out, mistakes = rehearse(sft, "--task", "sudoku", "--train_size", "8", "--eval_size", "4", "--bf16", "false")
    assert (code, mistakes) == (0, []) and "8, of 40 to 40 tokens" in out
    mask = AutoConfig.from_pretrained(tiny_policy_path()).diffusion_spec["mask_token_id"]
    text = AutoTokenizer.from_pretrained(tiny_policy_path()).convert_ids_to_tokens(mask)
    Path("rows.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{n}+{text}=", "completion": "2"}) for n in range(8))
    )
    _, _, mistakes = rehearse(
        sft, "--train_file", "rows.jsonl", "--weighting", "sum", "--model_name_or_path", policy(), *SHORT
    )
    assert any("`weighting` must be" in one or "argument --weighting" in one for one in mistakes)
    assert any(f"the mask token ({mask})" in one for one in mistakes), mistakes


def test_collect_and_iterate(rehearse, capsys):
    code, out, mistakes = rehearse(collect, "--train_size", "4", "--eval_size", "4")
    assert (code, mistakes) == (0, []) and "sudoku: 4 puzzles to answer, 16 times each" in out
    _, _, mistakes = rehearse(collect, "--train_file", "nothing.csv", "--use_peft", "--approximate_cache", "sub_block")
    assert len(mistakes) == 3 and all(
        any(text in one for one in mistakes) for text in ("nothing.csv", "--use_peft", "approximate_cache")
    )
    Path("rounds.yaml").write_text(
        "output_dir: run\ncollect: {train_size: 4, eval_size: 4, num_responses: 2}\n"
        "train: {eval_size: 4, per_device_train_batch_size: 4, num_generations: 4, top_k: 3, bf16: false}\n"
    )
    assert iterate.main(["--config", "rounds.yaml", "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert "error: train, options: " in error and "`top_k`" in error and "compares 4 responses to a prompt" in error
    assert not Path("run").exists()


@pytest.mark.parametrize("option", ["server", "responses"])
def test_responses_from_elsewhere_are_not_rehearsed(rehearse, option):
    """What a policy would need here says nothing about them."""
    code, out, mistakes = rehearse(collect, "--output_dir", "out", f"--{option}", "x")
    assert code == 2
    assert any(
        f"`--dry_run` rehearses what a policy answers here, and `--{option}` has the responses from" in one
        for one in mistakes
    )
    assert not Path("out").exists()
