"""Responses that are there already become a collection, row by row, and a wrong row is named."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from tests.trainer.conftest import codes
from trl_diffusion import load_trajectories, tiny_policy_path
from trl_diffusion.commands import collect as command
from trl_diffusion.offline.responses import import_responses
from trl_diffusion.trajectories.dataset import check_trajectories, completions_of


@pytest.fixture(scope="module")
def config():
    return AutoConfig.from_pretrained(tiny_policy_path())


@pytest.fixture
def imported(tokenizer, char_spec, config, tmp_path):
    def run(rows, reward_funcs=None, **options):
        directory = import_responses(
            rows,
            tokenizer,
            char_spec,
            config,
            tmp_path / "run",
            reward_funcs,
            source="own.jsonl",
            disable_tqdm=True,
            **options,
        )
        stored = load_trajectories(directory)
        check_trajectories(stored, char_spec, config.vocab_size)
        return stored

    return run


def test_responses_and_rewards_of_a_file(imported, tokenizer):
    """Groups may have different sizes. Rewards have names, or not; a reward function may be asked, too."""
    rows = [
        {"prompt": "1+1=", "responses": ["2", "3", "12+"], "rewards": {"right": [1, 0, None]}, "answer": 2},
        {"prompt": "2+2=", "responses": ["4"], "rewards": {"right": [0.5]}, "answer": 4},
    ]
    stored = imported(rows, codes, rows_per_shard=1)
    assert stored["reward_right"][:] == [[1.0, 0.0, None], [0.5]] and stored["answer"][:] == [2, 4]
    assert len(stored[0]["reward_codes"]) == 3 and stored["prompt"][:] == ["1+1=", "2+2="]
    stop = tokenizer.eos_token_id
    for row, given in zip(stored, rows, strict=True):
        assert row["prompt_ids"] == tokenizer(given["prompt"])["input_ids"]
        expected = [[*tokenizer(text, add_special_tokens=False)["input_ids"], stop] for text in given["responses"]]
        assert completions_of(row) == expected and row["event_logps"] is None
        assert json.loads(row["decoding"])["order"] is None and row["policy_fingerprint"] is None
        assert all(set(steps) == {0} for steps in row["event_steps"])


def test_rows_with_one_response_make_groups(imported):
    rows = [{"prompt": "1+1=", "response": "2", "reward": 1}, {"prompt": "2+2=", "response": "5", "reward": 0},
            {"prompt": "1+1=", "response": "3", "reward": 0}]  # fmt: skip
    stored = imported(rows)
    assert stored["prompt"][:] == ["1+1=", "2+2="] and stored["reward_given"][:] == [[1.0, 0.0], [0.0]]


@pytest.mark.parametrize("single", [False, True])
def test_a_response_that_was_cut_off_has_no_stop_token(imported, tokenizer, single):
    rows = [{"prompt": "1+1=", "responses": ["23", "2", "3"], "rewards": [0, 1, 0],
             "finish_reasons": ["length", "stop", None]}]  # fmt: skip
    if single:
        names = {"response": "responses", "reward": "rewards", "finish_reason": "finish_reasons"}
        rows = [{"prompt": "1+1=", **{one: rows[0][all][i] for one, all in names.items()}} for i in range(3)]
    (row,) = imported(rows)
    stop, own = tokenizer.eos_token_id, tokenizer("23", add_special_tokens=False)["input_ids"]
    assert completions_of(row) == [own, [own[0], stop], [own[1], stop]] and "finish_reason" not in str(list(row))


GOOD = {"prompt": "1+1=", "responses": ["2", "3"], "rewards": [1, 0]}
WRONG = {
    "no prompt": ({**GOOD, "prompt": None}, "own.jsonl, row 1 has no prompt"),
    "another prompt": ({**GOOD, "prompt": ["x"]}, "own.jsonl, row 1: a prompt must be text or a list of messages"),
    "no response": (
        {"prompt": "x", "rewards": [1]},
        "row 1: needs either `responses`, a list of texts, or `response`",
    ),
    "both": ({**GOOD, "response": "2"}, "row 1: needs either"),
    "no text": ({**GOOD, "responses": ["2", 3]}, "row 1, `responses`: must be text"),
    "no list": ({**GOOD, "responses": "2"}, "row 1, `responses`: must be text"),
    "an empty response": ({**GOOD, "responses": ["2", ""]}, "row 1, `responses`: must be text that is not empty"),
    "too few rewards": (
        {**GOOD, "rewards": [1]},
        r"row 1, `rewards`: must be a number for each of 2 responses, got \[1\]",
    ),
    "no reward": ({**GOOD, "rewards": [1, "x"]}, "row 1, `rewards`: a reward is a finite number or null, got 'x'"),
    "NaN": ({**GOOD, "rewards": [1, float("nan")]}, "row 1, `rewards`: a reward is a finite number or null"),
    "other rewards": ({**GOOD, "rewards": {"x": [1, 0]}}, r"row 1: has the rewards \['x'\], and own.jsonl, row 0 has"),
    "reward": ({**GOOD, "reward": 1}, "row 1: `reward` does not go with `responses`"),
    "another reason": (
        {**GOOD, "finish_reasons": ["stop", "tool_calls"]},
        r'row 1, `finish_reasons`: must be "stop", "length" or null for each of 2 responses, got',
    ),
    "one reason for two": ({**GOOD, "finish_reasons": ["stop"]}, "row 1, `finish_reasons`: must be"),
    "reasons in a table": ({**GOOD, "finish_reasons": [["stop"], "stop"]}, "row 1, `finish_reasons`: must be"),
    "reason": ({**GOOD, "finish_reason": "stop"}, "row 1: `finish_reason` does not go with `responses`"),
    "other columns": ({**GOOD, "answer": 1}, r"row 1: has the columns \['answer'\], and own.jsonl, row 0 has \[\]"),
    "a column of ours": ({**GOOD, "spec": 1}, r"row 1: trajectories need the columns \['spec'\]"),
    "the mask token": ({**GOOD, "responses": ["2", "[MASK]"]}, "row 1, response 1: holds the mask token"),
    "long": ({**GOOD, "responses": ["2", "3" * 30]}, "row 1, response 1: has 31 tokens, more than"),
    "too long": ({**GOOD, "prompt": "1" * 600}, "row 1: .*more than the policy's context"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_named(imported, tokenizer, name):
    row, message = WRONG[name]
    row = json.loads(json.dumps(row).replace("[MASK]", tokenizer.mask_token))
    with pytest.raises(ValueError, match=message):
        imported([GOOD, row], max_new_tokens=20)


def test_conversations(imported, tokenizer, monkeypatch):
    """The response is the assistant's message, as the chat template writes it."""
    template = "{% for message in messages %}{{ '=' + message['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    prompt = [{"role": "user", "content": "1+1"}]
    stored = imported([{"prompt": prompt, "responses": ["2", "3"]}], by_text)
    assert stored[0]["prompt_ids"] == tokenizer("=1+1=")["input_ids"] and stored[0]["prompt"] == prompt
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions_of(stored[0])] == ["2", "3"]
    assert stored[0]["reward_by_text"] == [2.0, 3.0]


def by_text(completions, **kwargs) -> list[float]:
    return [float(message["content"]) for (message,) in completions]


def test_a_table(tmp_path):
    """Numbers are text there, and an empty place is no reward."""
    file = tmp_path / "own.csv"
    file.write_text("prompt,response,reward,answer\n1+1=,2,1,2\n1+1=,3,0.5,2\n1+1=,4,,2\n")
    command.main(["--responses", str(file), "--output_dir", str(tmp_path / "run")])
    stored = load_trajectories(tmp_path / "run")
    assert stored["reward_given"][:] == [[1.0, 0.5, None]] and stored["answer"][:] == ["2"]
    file.write_text("prompt,response,reward\n1+1=,2,good\n")
    with pytest.raises(SystemExit):
        command.main(["--responses", str(file), "--output_dir", str(tmp_path / "other")])


def test_more_that_is_wrong(imported):
    single = {"prompt": "1+1=", "response": "2", "reward": 1}
    with pytest.raises(
        ValueError, match="row 1: has the same prompt as own.jsonl, row 0, but other columns or rewards"
    ):
        imported([single, {**single, "answer": 2}])
    with pytest.raises(
        ValueError, match="own.jsonl has no rewards: add `rewards` to each row, or give `--reward_funcs`"
    ):
        imported([{"prompt": "x", "response": "2"}])
    with pytest.raises(ValueError, match=r"has rewards \['codes'\], which are also names of reward functions"):
        imported([{**GOOD, "rewards": {"codes": [1, 0]}}], codes)
    with pytest.raises(ValueError, match="has no rows"):
        imported([])


def test_the_command(tmp_path, capsys):
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "prompt": "2+2="}) + "\n")
    words = ["--responses", str(file), "--output_dir", str(tmp_path / "run")]
    command.main(words)
    assert "Trajectories and their card are in" in capsys.readouterr().out
    assert "2 prompts with 2 responses each" in (tmp_path / "run" / "README.md").read_text()
    file.write_text(json.dumps(GOOD) + "\n{\n")
    with pytest.raises(SystemExit) as end:
        command.main(words)
    assert end.value.code == 2 and "own.jsonl, line 2: not JSON" in capsys.readouterr().err
    file.write_text(json.dumps({**GOOD, "rewards": [0, 1]}) + "\n")
    with pytest.raises(SystemExit) as end:
        command.main(words)
    assert "holds a collection with other settings" in capsys.readouterr().err
