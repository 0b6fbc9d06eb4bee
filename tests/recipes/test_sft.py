"""`trl-diffusion sft` as a user runs it, on small settings."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer

from trl_diffusion import DecodingConfig, collect, load_trajectories, tiny_policy_path
from trl_diffusion.commands import generate, sft
from trl_diffusion.policies.policy import open_policy
from trl_diffusion.rewards import sudoku
from trl_diffusion.tasks import load_task
from trl_diffusion.viz.runs import heading, panels, read_run


@pytest.fixture
def tune(tmp_path, monkeypatch, capsys):
    """The command in this process: the lines that it prints."""

    def start(*arguments: str) -> list[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sft, "use_all_cores", lambda: None)
        sft.main(list(arguments))
        return capsys.readouterr().out.strip().splitlines()

    return start


SMALL = ["--per_device_train_batch_size", "4", "--train_size", "12", "--eval_size", "4", "--max_steps", "2"]
OWN = ["--model_name_or_path", tiny_policy_path(), "--train_file"]
STEADY = ["--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "0"]


def has_line(lines: list[str], pattern: str) -> re.Match:
    found = [match for line in lines if (match := re.fullmatch(pattern, line))]
    assert len(found) == 1, "\n".join(lines)
    return found[0]


def test_the_embedded_policy(tmp_path, tune):
    """What a run says, what it leaves, and that its figures agree; and that an interrupted run ends as another one."""
    whole = tune(
        *SMALL, *STEADY, "--max_steps", "3", "--output_dir", "whole", "--save_strategy", "no", "--logging_steps", "1"
    )
    has_line(whole, r"Settings: \S*tiny_sft\.yaml, the recipe of the embedded policy; .* from the command line\.")
    has_line(whole, r"Policy: the embedded policy, 0\.67 million weights; block attention, blocks of 8 tokens\.")
    has_line(whole, r"Output: whole, with the trained policy at the end \(`save_strategy` is no: .*")
    has_line(whole, r"Measuring the policy on 4 puzzles that training never sees \.\.\.")
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    losses, rates = results["loss_before"], results["solve_rate_before"]
    has_line(whole, re.escape(f"solve rate before training: {rates:.1%}, loss {losses:.4f}"))
    has_line(whole, re.escape(f"loss {losses:.4f} -> {results['loss_after']:.4f} per token (4 puzzles, seed 0)"))
    has_line(
        whole, rf"solve rate {rates:.1%} -> {results['solve_rate_after']:.1%} \(4 puzzles, 95 % interval .*, seed 0\)"
    )
    assert (results["steps"], results["documents"], results["rows"]) == (3, 12, 4)
    assert {"model.safetensors", "tokenizer.json", "README.md", "sft.yaml", "run.png", "denoising.png"} <= {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    words = shlex.split(has_line(whole, r"Next: (.*)")[1])
    options = generate._parser().parse_args(words[2:])
    assert (options.model, options.max_new_tokens, options.tokens_per_step) == ("whole", 17, 2)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "with supervised fine-tuning by\ntrl_diffusion" in card and "| optimizer steps | 3 |" in card
    assert "None" not in card and 'pipeline("' not in card and "open_policy(path='whole')" in card
    run = read_run(tmp_path / "whole")
    assert heading(run).endswith(": 3 updates on documents")
    titles = ["loss", "held-out solve rate", "right guesses of masked tokens", "entropy per token, in nats", "gradient norm",
              "learning rate"]  # fmt: skip
    assert [panel.title for panel in panels([run])] == titles
    assert [bool(panel.curves[0]) for panel in panels([run])] == [True] * 6
    # The same run in two parts.
    tune(*SMALL, *STEADY, "--save_steps", "2", "--output_dir", "parts")
    tune(*SMALL, *STEADY, "--max_steps", "3", "--output_dir", "parts", "--resume_from_checkpoint", "true")
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole"))
    start = load_file(f"{tiny_policy_path()}/model.safetensors")
    assert found.keys() == wanted.keys() == start.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-8)
    assert any(not torch.equal(wanted[name], start[name]) for name in start)


def test_an_adapter_on_documents_of_a_file(tmp_path, tune):
    """It is trained further, with the options of the first time."""
    rows = [{"prompt": f"sudoku {puzzle}", "completion": "1234"} for puzzle in sudoku.evaluation_puzzles()[:8]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        "--model_name_or_path",
        tiny_policy_path(),
        "--train_file",
        "rows.jsonl",
        "--max_steps",
        "1",
        "--bf16",
        "false",
    ]
    lora = [
        "--use_peft",
        "--lora_target_modules",
        "all-linear",
        "--output_dir",
        "lora",
        "--gradient_checkpointing",
        "false",
    ]
    out = tune(*options, *lora)
    has_line(
        out, r"Settings: the defaults of DiffusionSFTConfig \(learning_rate 2e-05, .*; .* from the command line\."
    )
    has_line(out, r"Policy: the embedded policy, .* of which the adapter's .* are trained; .*")
    has_line(out, r"loss \d\.\d{4} -> \d\.\d{4} per token \(4 documents, seed 42\)")
    assert any("--adapter lora" in line for line in out if line.startswith("Next: "))
    first = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    out = tune("--model_name_or_path", "lora")
    assert has_line(out, r"Settings: (.*)")[1].startswith("as lora was trained (lora/sft.yaml); --model_name_or_path")
    second = load_file(tmp_path / "lora_continued" / "adapter_model.safetensors")
    assert first.keys() == second.keys() and any(not torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def collection(tmp_path) -> list[list[float]]:
    """A small collection in `stored`. The reward of a response is what it was seen to be: its place in the group."""
    policy, task = open_policy(tiny_policy_path()), load_task("sudoku", train_size=3, eval_size=1)
    rewards = []

    def place(completions, **columns):
        rewards.extend(float(number % 4) for number in range(len(completions)))
        return rewards[-len(completions) :]

    decoding = DecodingConfig(17, 1.0, tokens_per_step=4)
    collect(
        policy.model,
        policy.tokenizer,
        task.train,
        place,
        tmp_path / "stored",
        decoding,
        num_responses=4,
        disable_tqdm=True,
    )
    return rewards


def test_the_best_responses_of_a_collection(tmp_path, tune, collection, monkeypatch):
    """What is trained is the last response of each group, token for token."""
    trained = []
    load = sft.load_data
    monkeypatch.setattr(sft, "load_data", lambda *given: trained.append(load(*given)) or trained[0])
    out = tune("--trajectories", "stored", *SMALL[:2], "--eval_size", "2", "--max_steps", "1")
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    texts = [tokenizer.decode(ids) for ids in trained[0].train["input_ids"]]
    stored = load_trajectories(tmp_path / "stored")
    expected = []
    for row in stored:
        by_place = dict(zip(row["event_positions"][3], row["event_tokens"][3], strict=True))
        completion = [by_place[position] for position in range(row["completion_lengths"][3])]
        expected.append(row["prompt"] + tokenizer.decode(completion))
    assert texts == expected and len(texts) == 3
    # The held-out rows are the task's, and their prompts are not trained.
    prepared = has_line(out, r"loss (\d\.\d{4}) -> \d\.\d{4} per token \(2 puzzles, seed 0\)")
    assert float(prepared[1]) < 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no_such_option", "1"], "there is no option --no_such_option; `trl-diffusion sft --help-all` lists"),
        (["--max_steps", "two"], "invalid int value: 'two'"),
        (["--max_steps", "0"], "`max_steps=0` trains nothing"),
        (["--eval_size", "0"], "`eval_size` must be a whole number of at least 1, got 0."),
        (["--model_name_or_path", tiny_policy_path()], "There is nothing to train on. Give documents with `--train_file`"),
        (["--trajectories", "nowhere"], "There are no trajectories in nowhere"),
        (["--task", "gsm8k"], "needs `--train_file`"),
        (["--complementary", "true", "--weighting", "elbo"], "`complementary` needs `weighting='mean'`"),
        (["--padding_free", "true"], "`padding_free`: the rows of the forward pass hold noisy copies of blocks"),
        ([*OWN, "one.jsonl"], "one.jsonl has a single document: nothing is left to measure on"),
        ([*OWN, "odd.jsonl"], "odd.jsonl: row 0 has the columns ['question']; documents have `messages`"),
        (["--train_file", "odd.jsonl"], "odd.jsonl: row 0 has the columns ['question']; documents have `messages`"),
        ([*OWN, "empty.jsonl"], "empty.jsonl, row 1: `completion` must be text or a list of messages, got ''."),
        ([*OWN, "mixed.jsonl"], "mixed.jsonl: some of ['prompt', 'completion'] are text and some are messages"),
        ([*OWN, "same.jsonl", "--eval_file", "same.jsonl"], "Every document of same.jsonl is among those to measure on"),
        ([*OWN, "same.jsonl", "--eval_file", "text.jsonl"], "text.jsonl has ['text'], but same.jsonl has ['completion', 'prompt']"),
        ([*OWN, "same.jsonl", "--trajectories", "stored"], "are both to be trained on"),
        (["--block_sizes", "1", "3", "8"], "must be whole numbers of at least 1 that divide the last one, got [1, 3, 8]"),
    ],
)  # fmt: skip
def test_what_a_user_can_set_right_is_said_in_a_line(tmp_path, tune, capsys, options, message):
    pair = '{"prompt": "a", "completion": "b"}\n'
    (tmp_path / "one.jsonl").write_text(pair)
    (tmp_path / "same.jsonl").write_text(pair * 3)
    (tmp_path / "odd.jsonl").write_text('{"question": "a"}\n')
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "empty.jsonl").write_text(pair + pair.replace('"b"', '""'))
    (tmp_path / "mixed.jsonl").write_text(pair + pair.replace('"b"', '[{"role": "assistant", "content": "b"}]'))
    with pytest.raises(SystemExit) as end:
        tune(*options, "--bf16", "false")
    assert end.value.code == 2
    shown = capsys.readouterr().err.splitlines()
    assert message in shown[-1] and shown[-1].startswith("error: "), shown
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("name", ["sudoku", "sparse_sudoku", "countdown"])
def test_right_answers_are_right(name):
    """Also those to puzzles of a file, which bring none along."""
    task = load_task(name, train_size=20, eval_size=20)
    for rows in (task.train, task.evaluation):
        documents = task.documents(rows)
        columns = {column: rows[column] for column in rows.column_names if column != "prompt"}
        assert task.solved(completions=documents["completion"], **columns) == [1.0] * 20
        assert list(documents["prompt"]) == list(rows["prompt"])


def test_a_puzzle_without_an_answer(tmp_path):
    (tmp_path / "rows.csv").write_text(f"puzzle\n11{'0' * 14}\n")
    task = load_task("sudoku", train_file=str(tmp_path / "rows.csv"), eval_size=1)
    with pytest.raises(ValueError, match=r"The task `sudoku` has no right answer to row 0: 'sudoku 11"):
        task.documents(task.train)
    assert sudoku.solve("3102200002100320") == "3142243142131324"


def test_answers_to_questions(tmp_path):
    """In the form of messages, without the annotations for a calculator."""
    pytest.importorskip("math_verify", reason="needs the extra `eval`")
    answer = "Half of 48 is <<48/2=24>>24.\nSo <<24+48=72>>72 in all.\n#### 72"
    rows = [{"question": f"How many are {number}?", "answer": answer} for number in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task("gsm8k", train_file=str(tmp_path / "rows.jsonl"), eval_size=1)
    (document,) = task.documents(Dataset.from_list(task.train.to_list()))
    assert document["completion"] == [{"role": "assistant", "content": "Half of 48 is 24.\nSo 72 in all.\n#### 72"}]
    assert document["prompt"][0]["content"].startswith("How many are 1?")
