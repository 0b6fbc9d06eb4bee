"""Rows and reward functions of one's own: `train`, `collect`, `evaluate` and `iterate` without a task."""

from __future__ import annotations

import json
import os
import statistics

import pytest
from datasets import Dataset, DatasetDict

from trl_diffusion.commands import collect, evaluate, recipes_path, train
from trl_diffusion.commands.iterate import Rounds
from trl_diffusion.commands.results import Measured, most_telling
from trl_diffusion.commands.settings import find_settings, keep_settings
from trl_diffusion.tasks.data import load_reward, load_rewards, task_of_data
from trl_diffusion.tasks.task import interval_of
from trl_diffusion.viz.runs import panels, read_run


REWARDS = """
def right_places(completions, wanted, **kwargs):
    return [sum(a == b for a, b in zip(one, two)) / 4 for one, two in zip(completions, wanted)]

def brief(completions, **kwargs):
    return [-float(len(one)) for one in completions]

def few(completions):
    return [0.0 for _ in completions]

NOT_A_FUNCTION = 3
"""
NUMBERS = range(1234, 1264)


def row(number: int) -> dict:
    return {"prompt": f"sort {number}", "wanted": "".join(sorted(str(number)))}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with rows and rewards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in NUMBERS))
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.setattr("trl_diffusion.commands.train.use_all_cores", lambda: None)
    return tmp_path


OWN = ("--train_file", "rows.jsonl", "--reward_funcs", "rewards.py:right_places", "./rewards.py:brief")


def own(*words: str, command=collect):
    """The options, read as the command reads them."""
    found = command.parse(list(words))
    return found[0] if isinstance(found, tuple) else found


# ------------------------------------------------------------------------------------------------------- from end to end


def test_a_policy_learns_from_rows(here, monkeypatch, capsys):
    """
    Trained for two updates, the policy is measured by the first reward, under that name, in the terminal, in the file and in the
    picture. It goes on with the same rows.
    """
    monkeypatch.setattr(train, "draw", lambda *_: [])
    small = (
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "16",
        "--num_generations",
        "4",
        "--max_completion_length",
        "4",
    )
    train.main([*OWN, "--eval_size", "6", "--reward_weights", "1", "0.1", "--output_dir", "run", *small])
    printed = capsys.readouterr().out
    results = json.loads((here / "run" / "results.json").read_text())
    assert results["rows"] == 6 and results["task"] == "rows.jsonl" and "solve_rate_after" not in results
    low, high = results["interval_after"]
    assert 0 <= results["mean_reward_after"] <= 1 and low <= results["mean_reward_after"] <= high
    before, after = (f"{round(results[f'mean_reward_{when}'], 6):.4g}" for when in ("before", "after"))
    assert (
        f"mean reward before training: {before}" in printed and f"\nmean reward {before} -> {after} (6 rows" in printed
    )
    assert "solve" not in printed.replace("resolve", "")
    log = json.loads((here / "run" / "trainer_state.json").read_text())["log_history"]
    assert any("rewards/right_places/mean" in one and "rewards/brief/mean" in one for one in log)
    assert "held-out mean reward" in [panel.title for panel in panels([read_run(here / "run")])]
    settings = find_settings(["--model_name_or_path", "run"])
    assert settings.options["reward_funcs"] == ["rewards.py:right_places", "./rewards.py:brief"]
    script_args, args, _ = train.parse(settings.arguments)
    assert script_args.is_own and args.reward_weights == [1.0, 0.1]


def test_rows_are_collected_and_measured(here, capsys):
    """`collect` leaves out what `train` measures; the command that it names next reads the same rows."""
    small = ("--train_size", "4", "--eval_size", "6", "--num_responses", "2", "--max_completion_length", "4")
    collect.main([*OWN, *small, "--output_dir", "stored"])
    stored = Dataset.from_parquet(str(here / "stored" / "data" / "*.parquet"))
    assert [one["prompt"] for one in stored] == [f"sort {number}" for number in NUMBERS[:4]]
    assert {"reward_right_places", "reward_brief"} <= set(stored.column_names)
    following = capsys.readouterr().out.splitlines()[-1].split()
    for word in ("--train_file", "--reward_funcs", "./rewards.py:brief", "--eval_size"):
        assert word in following
    assert "--task" not in following
    assert (
        following[following.index("--model_name_or_path") + 1] == "embedded:block"
    )  # which needs no path of this machine

    evaluate.main(
        [
            *OWN[:4],
            "--eval_file",
            "rows.jsonl",
            "--limit",
            "5",
            "--decoding",
            "max_new_tokens:4",
            "--output_dir",
            "measured",
        ]
    )
    found = json.loads((here / "measured" / "rows.jsonl_seed0.json").read_text())
    samples = [
        json.loads(line) for line in (here / "measured" / "rows.jsonl_seed0_samples.jsonl").read_text().splitlines()
    ]
    assert [one["prompt"] for one in samples] == [f"sort {number}" for number in NUMBERS[:5]]
    assert (
        found["mean_reward"] == pytest.approx(statistics.fmean(one["score"] for one in samples))
        and found["accuracy"] is None
    )
    assert "| mean reward |" in (here / "measured" / "results.md").read_text()


# --------------------------------------------------------------------------------------------------------------- options


def test_the_command_line_takes_the_place_of_the_task_of_a_recipe(here):
    for words in (("--config", str(recipes_path() / "tiny_sudoku.yaml")), ()):
        settings = find_settings([*words, *OWN])
        assert own(*settings.arguments, command=train).task is None
        keep_settings(settings.options, here)
        assert "task: none" in (here / "train.yaml").read_text()
    assert own().task == own(command=train).task == "sudoku"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task gsm8k --dataset_name data --reward_funcs brief", "`--task gsm8k` has rows and rewards of its own: leave it or `--dataset_name`"),
        ("--dataset_name data", "The rows of data have no reward: give `--reward_funcs`"),
        ("--reward_funcs math_accuracy", "need rows: give `--dataset_name` or `--train_file`"),
        ("--reward_funcs math_accuracy --dataset_name data --train_file rows.jsonl", "are both rows to train on"),
        ("--system_prompt Hello", "`--system_prompt` is for rows of your own"),
        ("--dataset_config main", "`--dataset_config` is for rows of your own"),
        ("--reward_funcs math_accuracy --train_file rows.jsonl --dataset_test_split dev", "`--dataset_test_split` is for `--dataset_name`"),
        ("--task chess", "Unknown task 'chess'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [train, collect])
def test_options_that_do_not_go_together(command, words, message):
    with pytest.raises(ValueError, match=message):
        own(*words.split(), command=command)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tasks chess", "Unknown task 'chess'; there are .*'gsm8k'"),
        ("--tasks sudoku --eval_file rows.jsonl", "need `--reward_funcs`, or a task of `train`"),
        ("--reward_funcs math_accuracy", "need rows"),
    ],
)
def test_options_of_evaluate(words, message):
    with pytest.raises(ValueError, match=message):
        own(*words.split(), command=evaluate)


def load(*words: str, train_size: int = 100, eval_size: int = 6):
    return own(*words).load_task(train_size, eval_size, 0)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("math_acuracy", r"Unknown reward function 'math_acuracy'; .*Is it meant to be math_accuracy\?"),
        ("rewards.py:breif", "rewards.py has nothing that is called 'breif'. Is it meant to be brief"),
        ("rewards.py:NOT_A_FUNCTION", "must be a function, got 3"),
        ("rewards.py", "names no function. Write rewards.py:FUNCTION"),
        ("absent.py:brief", "There is no file absent.py for the reward function"),
        ("no_such_module.brief", "There is no module 'no_such_module'"),
        ("collections.OrderedDict", "must be a function, got <class"),
        ("math_accuracy", r"math_accuracy needs the columns \['answer'\]; rows.jsonl has \['prompt', 'wanted'\]"),
        ("math.sqrt", r"sqrt needs the columns \['x'\]"),
        ("rewards.py:few", r"few must take `completions` and `\*\*kwargs`, as those of TRL do"),
    ],
)
def test_wrong_rewards(here, reward, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load("--train_file", "rows.jsonl", "--reward_funcs", reward)


def test_the_same_name_twice(here):
    with pytest.raises(ValueError, match="need different names, got"):
        load_rewards(["rewards.py:brief", "./rewards.py:brief"])


def test_rewards_of_trl():
    pytest.importorskip("math_verify")
    assert load_reward("accuracy_reward").__module__.startswith("trl.")
    assert load_reward("get_soft_overlong_punishment")(completion_ids=[[0] * 2000]) == [-1.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a"}\n', r"must have a column `prompt` or `messages`; it has \['question'\]"),
        (
            '{"prompt": "a", "completions": "b"}\n',
            r"has the columns \['completions'\], which reward functions get from elsewhere",
        ),
        ('{"prompt": "a"}\n', "has a single row: nothing is left to measure on"),
        ('{"prompt": "a"}\n' * 4, "Every prompt of bad.jsonl is among those to measure on"),
        (
            '{"prompt": "a"}\n{"prompt": null}\n{"prompt": "c"}\n{"prompt": "d"}\n',
            "bad.jsonl, row 1: the prompt must be text",
        ),
        ('{"prompt": [{"content": "a"}]}\n{"prompt": []}\n', "row [01]: the prompt must be text, or messages"),
        (
            '{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}\n',
            "the values of a column must be of one kind",
        ),
        ('{"prompt": "a", "n": 1}\n{"prompt": "b", "n": "x"}\n', "the values of a column must be of one kind"),
        ("", "has no rows"),
        ("{", "not JSON"),
    ],
)
def test_wrong_rows(here, text, message):
    (here / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message) as found:
        load("--train_file", "bad.jsonl", "--reward_funcs", "rewards.py:brief")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("command", [train, collect])
def test_rows_without_rewards(here, command):
    """Rows are those of a task then. A row of one's own is none of it, and what is missing is said."""
    with pytest.raises(
        ValueError, match=r"it has \['prompt', 'wanted'\]. .* rows of the task sudoku. .* give `--reward_funcs`"
    ):
        own("--train_file", "rows.jsonl", command=command).load_task(4, 4, 0)


def test_a_file_that_another_option_reads(here):
    Dataset.from_list([row(1234)]).to_parquet("rows.parquet")
    with pytest.raises(ValueError, match="must end in .csv, .jsonl or .json. `--dataset_name` reads it"):
        load("--train_file", "rows.parquet", "--reward_funcs", "rewards.py:brief")


def test_sizes(here):
    with pytest.raises(ValueError, match="`eval_size` must be a whole number of at least 1"):
        load(*OWN, eval_size=0)


# ------------------------------------------------------------------------------------------------------------------ rows


def test_the_last_rows_are_measured(here):
    """Not more than half of them, and no row with such a prompt is trained."""
    task = load(*OWN)
    assert task.evaluation["prompt"] == [f"sort {number}" for number in NUMBERS[-6:]]
    assert task.train["prompt"] == [f"sort {number}" for number in NUMBERS[:-6]] and task.train[0]["wanted"] == "1234"
    assert len(load(*OWN, eval_size=500).evaluation) == len(NUMBERS) // 2
    rows = [row(1), row(2), row(3), row(1)]
    few = task_of_data("rows", Dataset.from_list(rows), None, [load_reward("rewards.py:brief")], 10, 1)
    assert few.train["prompt"] == ["sort 2", "sort 3"] and few.evaluation["prompt"] == ["sort 1"]


def test_messages_and_a_system_prompt(here):
    conversations = [
        {"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "yes"}], "n": n}
        for n in range(4)
    ]
    (here / "chats.json").write_text(json.dumps(conversations))
    words = ("--train_file", "chats.json", "--reward_funcs", "rewards.py:brief")
    task = load(*words, eval_size=1)
    assert task.train["prompt"][1] == [{"role": "user", "content": "1"}] and task.train.column_names == ["prompt", "n"]
    system = {"role": "system", "content": "Be brief."}
    asked = load(*words, "--system_prompt", "Be brief.", eval_size=1).evaluation["prompt"]
    assert asked == [[system, {"role": "user", "content": "3"}]]
    from_text = load(*OWN, "--system_prompt", "Be brief.", train_size=1).train["prompt"]
    assert from_text == [[system, {"role": "user", "content": "sort 1234"}]]
    (here / "chats.json").write_text(json.dumps([{"messages": [system, *one["messages"]]} for one in conversations]))
    with pytest.raises(ValueError, match="row 0 has a message of the system already: leave `--system_prompt` out"):
        load(*words, "--system_prompt", "Be brief.", eval_size=1)


def test_datasets(here):
    """As TRL's scripts read them: a directory of `save_to_disk`, a data file, or a directory of data files."""
    numbers = list(NUMBERS)
    splits = DatasetDict(
        train=Dataset.from_list([row(n) for n in numbers]), test=Dataset.from_list([row(n) for n in numbers[:3]])
    )
    splits.save_to_disk("saved")
    splits["train"].save_to_disk("single")
    (here / "folder").mkdir()
    for name, split in (("train", "train"), ("dev", "test")):
        splits[split].to_json(f"folder/{name}.jsonl")
    words = ("--reward_funcs", "rewards.py:right_places", "--dataset_name")
    task = load(*words, "saved")
    assert task.evaluation["prompt"] == task.evaluation.to_dict()["prompt"] == [f"sort {n}" for n in numbers[:3]]
    assert task.train["prompt"] == [f"sort {n}" for n in numbers[3:]]
    for one in ("single", "rows.jsonl"):
        assert load(*words, one).evaluation["prompt"] == [f"sort {n}" for n in numbers[-6:]]
    assert load(*words, "saved", "--eval_file", "rows.jsonl", eval_size=1).evaluation["prompt"] == [
        f"sort {numbers[0]}"
    ]
    assert load(*words, "saved", "--dataset_train_split", "test", eval_size=1).train["prompt"] == [
        f"sort {numbers[n]}" for n in (1, 2)
    ]
    for wrong, message in (
        (("saved", "--dataset_train_split", "training"), r"has no split 'training' \(`--dataset_train_split`\); it has \['test', 'train'\]"),
        (("saved", "--dataset_test_split", "dev"), r"has no split 'dev' \(`--dataset_test_split`\)"),
        (("saved", "--dataset_config", "main"), "cannot be loaded: a dataset on disk has no configurations"),
        (("rewards.py",), r"cannot be loaded: a data file must end in one of \['.csv'"),
        (("no/such/../dataset",), "cannot be loaded: .* There is no such file or directory here"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message) as found:
            load(*words, *wrong)
        assert "\n" not in str(found.value)


def test_a_folder_of_data_files(here, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    os.makedirs("folder")
    for name, size in (("train", 8), ("test", 2)):
        Dataset.from_list([row(n) for n in NUMBERS[-size:]]).to_json(f"folder/{name}.jsonl")
    task = load("--reward_funcs", "rewards.py:brief", "--dataset_name", "folder")
    assert (len(task.train), len(task.evaluation)) == (6, 2)


# ---------------------------------------------------------------------------------------------------- rounds and figures


def test_rounds_share_their_data(here):
    data = {"train_file": "rows.jsonl", "reward_funcs": ["rewards.py:brief"]}
    rounds = Rounds("run", collect=data, train={"max_steps": 1, "eval_size": 4})
    for options in (rounds.collect_options(1), rounds.train_options(1)):
        assert (options["train_file"], options["reward_funcs"], options["eval_size"]) == (*data.values(), 4)
    assert "task" not in rounds.train_options(1)
    with pytest.raises(ValueError, match="`train` has `reward_funcs`, but `collect` has none. Move it there"):
        Rounds("run", train={"reward_funcs": ["rewards.py:brief"]})
    with pytest.raises(ValueError, match="Give both the same `task`"):
        Rounds("run", collect=data, train={"task": "sudoku"})
    with pytest.raises(ValueError, match=r"`collect` has `eval_size` 3 and `train` 4"):
        Rounds("run", collect={"eval_size": 3}, train={"eval_size": 4})


def test_the_interval_of_a_mean():
    """By the textbook: 1.96 standard errors to both sides; a share has Wilson's interval, which stays between 0 and 1."""
    low, high = interval_of([1.0, 2.0, 3.0, 4.0], "mean reward")
    error = 1.959964 * (5 / 3) ** 0.5 / 2
    assert (low, high) == pytest.approx((2.5 - error, 2.5 + error), rel=1e-6)
    assert interval_of([2.0], "mean reward") == (2.0, 2.0)
    assert interval_of([1.0] * 4, "solve rate") == pytest.approx((0.5101, 1.0), rel=1e-3)
    measured = Measured(["", ""], [-1.5, -0.5], None, "mean reward")  # type: ignore[arg-type]
    assert (measured.key, measured.said) == ("mean_reward", "-1")
    assert most_telling([-1.0, -3.0, 0.0], [-1.0, -2.0, 0.5]) == 1
