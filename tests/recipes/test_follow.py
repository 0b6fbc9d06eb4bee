"""docs/follow.py: what it takes for a training that learns something, and that it takes steps in one shell and one session."""

from __future__ import annotations

import io
import json
import math
import os
from contextlib import redirect_stdout
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trl_diffusion import DTRPOTrainer


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def follow():
    spec = spec_from_file_location("follow", ROOT / "docs" / "follow.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def log(*values: tuple[float, float], grad_norm: float = 1.0, **more) -> list[dict]:
    """The log of a training, from its losses and rewards."""
    rows = [{"loss": loss, "reward": reward, "grad_norm": grad_norm, **more} for loss, reward in values]
    return [*rows, {"train_loss": 0.0}]


def test_a_training_that_learns(follow):
    follow.check_log(log((0.1, 0.2), (0.1, 0.3), reward_std=0.1))
    follow.check_log([{"loss": 0.7, "grad_norm": 2.0}, {"loss": 0.6, "grad_norm": 2.0}])  # of pairs
    follow.check_log(log((0.0, 0.2), reward_std=0.1))
    follow.check_results({"solve_rate_before": 0.1, "solve_rate_after": 0.2})
    follow.check_results({"loss_before": 0.7})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"train_loss": 0.0}], "no update is in the log"),
        (log((0.1, 0.2), (math.nan, 0.3)), "loss is not finite"),
        (log((0.1, math.inf), (0.1, 0.3)), "reward is not finite"),
        (log((0.1, 0.2), (0.1, 0.3), grad_norm=0.0), "no update had a gradient"),
        (log((0.1, 0.2), (0.1, 0.3), reward_std=0.0), "have the same reward"),
        (log((0.1, 0.2), (0.1, 0.2), reward_std=0.1), "are constant"),
    ],
)
def test_trainings_that_learn_nothing(follow, rows, message):
    with pytest.raises(ValueError, match=message):
        follow.check_log(rows)


def test_a_policy_that_is_no_better(follow):
    with pytest.raises(ValueError, match="the solve rate is 10.0% after training and 10.0% before"):
        follow.check_results({"solve_rate_before": 0.1, "solve_rate_after": 0.1})
    goes_on = {"command": "trl-diffusion train --model_name_or_path outputs/a", "solve_rate_before": 0.84}
    follow.check_results({**goes_on, "solve_rate_after": 0.83, "interval_after": [0.79, 0.86]})
    with pytest.raises(ValueError, match="80.0% after training and 84.0% before"):
        follow.check_results({**goes_on, "solve_rate_after": 0.8, "interval_after": [0.76, 0.83]})


def test_trainers_are_watched(follow, monkeypatch):
    """Weights that stay as they are, and a log that shows nothing, are errors, with exit code 0 or not."""
    model = torch.nn.Linear(2, 1)
    trainer = SimpleNamespace(model=model, state=SimpleNamespace(log_history=log((0.1, 0.2), reward_std=0.1)))
    monkeypatch.setattr(DTRPOTrainer, "train", lambda self, move=0.0: self.model.weight.data.add_(move))
    original = DTRPOTrainer.train
    with follow.watched_trainers() as trained:
        with pytest.raises(ValueError, match="training has moved no weight"):
            DTRPOTrainer.train(trainer)
        DTRPOTrainer.train(trainer, move=0.1)
        trainer.state.log_history = []
        with pytest.raises(ValueError, match="no update is in the log"):
            DTRPOTrainer.train(trainer, move=0.1)
    assert trained == [trainer] and DTRPOTrainer.train is original


def test_a_page_is_followed(follow, tmp_path, monkeypatch):
    """Later commands know the variables of earlier ones. What a page claims and no command did is a failure."""
    page = tmp_path / "page.md"
    page.write_text(
        "`outputs/run` holds it, `outputs/absent` too. It ends with `solve rate 10% -> 50%`.\n\n"
        "```bash\nNAME=run\nmkdir -p outputs/$NAME\necho 'solve rate 12.0% -> 53.0%'  # prints\n```\n\n"
        "```python\nnumber = 1\n```\n\n```bash\nfalse\n```\n\n```python\nassert number == 2, 'it is 1'\n```\n"
    )
    monkeypatch.setattr(follow, "ROOT", tmp_path)
    monkeypatch.setattr(follow, "Python", Session)
    todo = follow.steps("page.md")
    assert [step.language for step in todo] == ["bash", "bash", "bash", "python", "bash", "python"]
    printed_by: dict = {}
    taken = follow.follow("page.md", todo, tmp_path, dict(os.environ), False, printed_by)
    found = [outcome.partition(" in ") for _, outcome in taken]
    assert [outcome for outcome, *_ in found[:3]] == ["done", "done", "done"] and (
        tmp_path / "outputs" / "run"
    ).is_dir()
    assert [outcome for outcome, *_ in found[3:6]] == ["done", "FAILED", "FAILED"]
    assert found[4][2].endswith("code 1") and found[5][2].endswith("AssertionError: it is 1")
    assert [outcome for outcome, *_ in found[6:]] == ["FAILED: there is no outputs/absent"]
    page.write_text(page.read_text().replace("50%", "60%"))
    assert follow.claimed_rates("page.md", "solve rate 12.0% -> 53.0%") == ["solve rate 10% -> 60%"]
    assert printed_by[todo[2]] == "solve rate 12.0% -> 53.0%\n"


def test_a_command_that_was_run_for_an_earlier_page(follow, tmp_path, monkeypatch):
    """Its rates count for the page that has it, too, and for no other one."""
    monkeypatch.setattr(follow, "ROOT", tmp_path)
    command, other = follow.Step("bash", "train"), follow.Step("bash", "sft")
    printed_by = {command: "solve rate 12.0% -> 53.0%\n", other: "solve rate 7.0% -> 90.0%\n"}
    for rate, failures in (("50", 0), ("90", 1)):
        (tmp_path / "page.md").write_text(f"It ends with `solve rate 10% -> {rate}%`.\n\n```bash\ntrain\n```\n")
        found = follow.follow("page.md", [], tmp_path, dict(os.environ), False, printed_by)
        assert [outcome for _, outcome in found] == failures * ["FAILED: no command printed `solve rate 10% -> 90%`"]


class Session:
    """Blocks in this process, without trainers, which would take seconds to import."""

    def __init__(self, *_):
        self.names: dict = {}

    def run(self, code: str) -> tuple[str, str]:
        printed = io.StringIO()
        try:
            with redirect_stdout(printed):
                exec(code, self.names)
        except Exception as error:
            return f"{type(error).__name__}: {error}", ""
        return "", printed.getvalue()

    def close(self) -> None: ...


def test_what_blocks_print_and_where_they_are_saved(follow, tmp_path, monkeypatch):
    """A claim that no block fulfils is a failure; commands find the file of the blocks before them."""
    page = tmp_path / "page.md"
    page.write_text(
        "It prints `one 1` and some more, and then prints `two`.\n\n"
        "<!-- saved as own.py -->\n```python\nx = 1\nprint('one', x)\n```\n\n"
        "```bash\ngrep -q 'x = 1' own.py\n```\n\n"
        "<!-- saved as own.py -->\n```python\ny = x + 1\n```\n\n```python\nassert y == 2\n```\n"
    )
    monkeypatch.setattr(follow, "ROOT", tmp_path)
    monkeypatch.setattr(follow, "Python", Session)
    todo = follow.steps("page.md")
    found = [outcome for _, outcome in follow.follow("page.md", todo, tmp_path, dict(os.environ), True, {})]
    assert [one.partition(" in ")[0] for one in found] == ["done"] * 4 + ["FAILED: no block printed `two`"]
    assert (tmp_path / "own.py").read_text().split() == "x = 1 print('one', x) y = x + 1".split()


def test_what_a_command_wrote_is_looked_at(follow, tmp_path, monkeypatch):
    run = tmp_path / "outputs" / "run"
    run.mkdir(parents=True)
    shell = follow.Shell(tmp_path, dict(os.environ))
    try:
        for name, content, message in (
            ("trainer_state.json", {"log_history": []}, "no update is in the log; set `logging_steps`"),
            ("results.json", {"solve_rate_before": 0.5, "solve_rate_after": 0.4}, "the solve rate is 40.0%"),
        ):
            (tmp_path / name).write_text(json.dumps(content))
            wrong, _ = shell.run(f"cp {name} outputs/run")
            assert wrong.startswith(message)
            (run / name).unlink()
        assert shell.run("true") == ("", "")
    finally:
        shell.close()


@pytest.mark.parametrize(
    ("command", "wheel", "need"),
    [
        ("make train", True, "needs a checkout"),
        ("accelerate launch recipes/train.py", True, "needs a checkout"),
        ("trl-diffusion train", True, None),
        ("trl-diffusion train --config llada --train_file x", False, "needs a model from the hub"),
        ("trl-diffusion plan GSAI-ML/LLaDA-8B-Instruct --config llada", True, None),  # its sizes are in the package
        ("trl-diffusion doctor --config llada_24gb --layers 2", True, None),
        ("trl-diffusion plan x --config recipes/llada.yaml", True, "needs a checkout"),
        ("git clone https://x", False, "needs a network"),
        ("trl-diffusion compare --study updates", False, "needs hours"),
        ("trl-diffusion compare --quick", False, None),
        ("trl-diffusion evaluate --tasks sudoku --data_dir data", False, "needs data"),
        ("trl-diffusion train --train_file data/rows.jsonl", False, "needs data/rows.jsonl"),
        ("trl-diffusion train --train_file outputs/rows.jsonl", True, None),
    ],
)
def test_what_cannot_be_run_here(follow, tmp_path, command, wheel, need):
    assert follow.reason(command, tmp_path, wheel) == need


def test_pages_come_in_the_order_of_the_site(follow):
    pages = follow.pages()
    assert pages[:3] == ["README.md", "docs/index.md", "docs/quickstart.md"] and "docs/howto/lora.md" in pages
    assert all((ROOT / page).is_file() for page in pages)
