"""An evaluation's figures are those of its rows: not of its batches, of other datasets, or of training."""

from __future__ import annotations

from collections import Counter

import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from tests.closeness import ROUNDING
from tests.conftest import make_policy
from tests.trainer.conftest import codes, make_dataset
from trl_diffusion.seeds import derive_seed


# What depends on the clock.
CLOCKED = ("runtime", "per_second", "model_preparation_time", "time/", "throughput/", "memory/", "step_time")


def figures(metrics: dict, prefix: str = "eval_") -> dict:
    return {
        name.removeprefix(prefix): value
        for name, value in metrics.items()
        if name.startswith(prefix) and not any(part in name for part in CLOCKED)
    }


def rows(number: int, **columns) -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"sudoku {row}", "worth": float(row == 0), "number": float(row)} for row in range(number)]
    )


def worth(completions, worth, **kwargs):
    return worth


def number(completions, number, **kwargs):
    """A reward that does not apply to every third prompt."""
    return [None if value % 3 == 0 else value for value in number]


def test_a_mean_over_nine_rows_is_a_ninth(make_trainer):
    """One of nine rows is worth something, whichever batch it is in and however many rows that has."""
    trainer = make_trainer(
        reward_funcs=worth, dataset=rows(4), kwargs={"eval_dataset": rows(9)}, num_generations_eval=1
    )
    for size in (1, 2, 4, 5, 8, 9):
        trainer.args.per_device_eval_batch_size = size
        metrics = trainer.evaluate()
        assert metrics["eval_rewards/worth/mean"] == pytest.approx(1 / 9, rel=1e-6), size
        assert metrics["eval_reward"] == pytest.approx(1 / 9, rel=1e-6), size


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer, char_spec):
    path = tmp_path_factory.mktemp("start")
    policy = make_policy(
        char_spec, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_hidden_layers=1
    )
    policy.save_pretrained(path)
    return str(path)


def drifted(trainer) -> None:
    """Recorded log-probabilities and the reference differ from the policy, so that no figure is trivially 0."""
    decode = trainer.decode

    def noisy(*args):
        batch = decode(*args)
        noise = 0.6 * torch.sin(7.0 * batch.canvas_ids + batch.steps)
        batch.logps = torch.where(batch.steps >= 0, batch.logps + noise, batch.logps)
        return batch

    trainer.decode = noisy
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.05)


SETTINGS = {
    "dapo": {"loss_type": "dapo"},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "luspo by sequences": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "masked": {"loss_type": "grpo", "mask_truncated_completions": True},
    "expected weight": {"loss_type": "dapo", "weighting": "none", "step_distribution": "uniform"},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_figures_are_those_of_trl_for_a_single_batch(make_trainer, start, case):
    """For any batch size: TRL's own code, given all rows as one batch. Ours, too, stay what they are then."""
    trainer = make_trainer(
        start, reward_funcs=[codes, number], dataset=rows(4), kwargs={"eval_dataset": rows(5)}, beta=0.1,
        num_generations_eval=2, temperature=0.7, per_device_eval_batch_size=10, **SETTINGS[case],
    )  # fmt: skip
    drifted(trainer)
    ours = figures(trainer.evaluate())

    trainer.row_seeds = lambda size: [derive_seed(trainer.args.seed, 1, 0, row) for row in range(size)]
    with torch.random.fork_rng():
        output = Trainer.evaluation_loop(trainer, trainer.get_eval_dataloader(), "TRL's")
    expected = {name: values[0] for name, values in trainer._metrics["eval"].items()}
    expected["loss"] = output.metrics["eval_loss"]
    trainer._metrics["eval"].clear()
    del trainer.row_seeds
    assert {"kl", "entropy", "reward", "rewards/number/std", "completions/mean_length", "loss"} <= set(expected)
    assert (
        abs(expected["loss"]) > 1e-3
        and expected["kl"] > 1e-3
        and expected["rewards/number/mean"] == pytest.approx(7 / 3)
    )
    if case not in ("cispo", "luspo by sequences"):
        assert 0 < expected["clip_ratio/region_mean"] < 1
    assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=ROUNDING)
    own = {name: value for name, value in ours.items() if name.startswith("diffusion/")}
    assert own["diffusion/recorded_gap/max"] > own["diffusion/recorded_gap/mean"] > 0.05
    assert len(own) >= 7

    for size in (2, 4, 6):
        trainer.args.per_device_eval_batch_size = size
        assert figures(trainer.evaluate()) == pytest.approx(ours, rel=1e-4, abs=ROUNDING), size


def test_pairs_of_an_evaluation_are_counted(make_trainer, start):
    trainer = make_trainer(
        start, dataset=rows(4), kwargs={"eval_dataset": rows(5)}, beta=0.1, loss_type="dpo", num_generations_eval=2,
        per_device_eval_batch_size=10, eval_strategy="steps", eval_steps=5,
    )  # fmt: skip
    drifted(trainer)
    whole = figures(trainer.evaluate())
    assert whole["pairs/count"] + whole["pairs/tied_groups"] == 5
    assert abs(whole["loss"] - 0.6931) > 1e-3 and {"rewards/margins", "rewards/accuracies", "kl"} <= set(whole)
    for size in (2, 4):
        trainer.args.per_device_eval_batch_size = size
        assert figures(trainer.evaluate()) == pytest.approx(whole, rel=1e-4, abs=ROUNDING), size


def test_what_a_reward_function_logs_is_weighed_by_rows(make_trainer):
    def noted(completions, number, log_metric, log_extra, **kwargs):
        log_metric("mean_number", sum(number) / len(number))
        log_extra("number", number)
        return number

    trainer = make_trainer(
        reward_funcs=noted, dataset=rows(4), kwargs={"eval_dataset": rows(5)}, num_generations_eval=1
    )
    for size in (2, 3, 5):
        trainer.args.per_device_eval_batch_size = size
        assert trainer.evaluate()["eval_mean_number"] == pytest.approx(2.0, rel=1e-6), size


def test_each_dataset_has_its_name(make_trainer):
    sets = {"low": rows(3), "high": rows(5).select([3, 4])}
    options = {"num_generations_eval": 1, "per_device_eval_batch_size": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(
        reward_funcs=[codes, number], dataset=rows(4), kwargs={"eval_dataset": sets}, max_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, greater_is_better=True,
        metric_for_best_model="eval_low_rewards/number/mean", **options,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(1.5)
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items() if "eval" in name}
    assert logged["eval_low_rewards/number/mean"] == pytest.approx(1.5)
    assert logged["eval_high_rewards/number/mean"] == pytest.approx(4.0)
    assert all(name.startswith(("eval_low_", "eval_high_")) for name in logged)
    for name in ("completions/mean_length", "diffusion/tokens_per_step", "reward", "loss", "entropy"):
        assert {f"eval_low_{name}", f"eval_high_{name}"} <= set(logged)


def test_predictions_stay_out_of_the_next_evaluation(make_trainer):
    trainer = make_trainer(
        reward_funcs=number, dataset=rows(4), kwargs={"eval_dataset": rows(3)}, num_generations_eval=1,
        per_device_eval_batch_size=2,
    )  # fmt: skip
    alone = figures(trainer.evaluate())
    predicted = figures(trainer.predict(rows(5).select([3, 4])).metrics, "test_")
    assert predicted["rewards/number/mean"] == pytest.approx(4.0)
    assert figures(trainer.evaluate()) == alone and alone["rewards/number/mean"] == pytest.approx(1.5)


def test_a_stream_is_evaluated_like_a_dataset(make_trainer):
    """Also by `predict`, whose prompts TRL does not repeat."""
    data = rows(5)
    trainer = make_trainer(
        reward_funcs=number, dataset=rows(4), num_generations_eval=2, per_device_eval_batch_size=4,
        kwargs={"eval_dataset": {"whole": data, "stream": data.to_iterable_dataset()}},
    )  # fmt: skip
    metrics = trainer.evaluate()
    predicted = trainer.predict(data.to_iterable_dataset()).metrics
    for name in ("rewards/number/mean", "rewards/number/std", "reward"):
        assert metrics[f"eval_stream_{name}"] == pytest.approx(metrics[f"eval_whole_{name}"], rel=1e-6)
        assert predicted[f"test_{name}"] == pytest.approx(metrics[f"eval_whole_{name}"], rel=1e-6)


def test_speed_is_that_of_all_responses(make_trainer):
    trainer = make_trainer(
        dataset=rows(4), kwargs={"eval_dataset": rows(5)}, num_generations_eval=2, per_device_eval_batch_size=4
    )
    metrics = trainer.evaluate()
    # Rates are rounded to three digits after the point, seconds to four.
    for name, count in (("samples", 10), ("steps", 3)):
        rate = count / metrics["eval_runtime"]
        assert metrics[f"eval_{name}_per_second"] == pytest.approx(rate, abs=1e-3, rel=0.01)


def test_batches_without_whole_groups(make_trainer):
    trainer = make_trainer(
        dataset=rows(4), kwargs={"eval_dataset": rows(3)}, num_generations_eval=4, per_device_eval_batch_size=6
    )
    with pytest.raises(
        ValueError, match=r"has 6 responses, which is not a multiple of the group size, 4 \(`num_generations_eval`\)"
    ):
        trainer.evaluate()
    assert "eval_reward" in trainer.evaluate(rows(1))  # one batch of 4


@pytest.mark.slow
def test_workers_that_persist_belong_to_one_dataset(make_trainer):
    trainer = make_trainer(
        reward_funcs=number, dataset=rows(4), kwargs={"eval_dataset": rows(3)}, num_generations_eval=1,
        per_device_eval_batch_size=3, dataloader_num_workers=1, dataloader_persistent_workers=True,
    )  # fmt: skip
    means = [
        trainer.evaluate(*dataset)["eval_rewards/number/mean"]
        for dataset in ((rows(6).select([4, 5]),), (), (rows(3).select([1]),))
    ]
    assert means == pytest.approx([4.5, 1.5, 1.0])
    assert trainer.args.dataloader_persistent_workers


# ------------------------------------------------------------------------------------------------------ training


def test_training_is_the_same_with_evaluations(make_trainer):
    """Draws, order of rows and weights, to the bit; and the log has the same figures of training."""
    logs, weights = [], []
    for evaluated in (False, True):
        options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4} if evaluated else {}
        trainer = make_trainer(
            kwargs={"eval_dataset": make_dataset(3)} if evaluated else None,
            steps_per_generation=2, per_device_train_batch_size=2, **options,
        )  # fmt: skip
        torch.manual_seed(5)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        logs.append([{k: v for k, v in entry.items() if not any(part in k for part in CLOCKED)} for entry in history])
        weights.append(list(trainer.model.parameters()))
    assert logs[0] == logs[1] and len(logs[0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


class EvaluatesInBetween(TrainerCallback):
    """Evaluates before the figures of the step are logged."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.evaluate()


def test_an_evaluation_before_the_log_leaves_the_figures_of_the_step(make_trainer):
    trainer = make_trainer(kwargs={"eval_dataset": make_dataset(2)}, per_device_eval_batch_size=4, max_steps=2)
    trainer.add_callback(EvaluatesInBetween(trainer))
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2
    for entry in steps:
        assert {"rewards/codes/mean", "diffusion/scored_tokens", "time/update", "entropy"} <= set(entry)
        assert not any(name.startswith("eval_") for name in entry)


def test_figures_of_several_steps(make_trainer):
    """Logged every three steps: the largest gap is the largest, and means are over responses or tokens."""

    def run(logging_steps):
        trainer = make_trainer(max_steps=3, logging_steps=logging_steps, num_iterations=3)
        torch.manual_seed(5)
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    each, (whole,) = run(1), run(3)
    tokens = [entry["diffusion/scored_tokens"] for entry in each]  # of four responses each
    gaps = [entry["diffusion/recorded_gap/mean"] for entry in each]
    assert whole["diffusion/recorded_gap/max"] == max(entry["diffusion/recorded_gap/max"] for entry in each)
    assert whole["diffusion/scored_tokens"] == pytest.approx(sum(tokens) / 3, rel=1e-6)
    mean = sum(t * g for t, g in zip(tokens, gaps, strict=True)) / sum(tokens)
    assert whole["diffusion/recorded_gap/mean"] == pytest.approx(mean, rel=1e-6)
    assert whole["memory/peak_gib"] >= max(entry["memory/peak_gib"] for entry in each[:1])
    # All responses over all seconds.
    seconds = 12 / whole["throughput/responses_per_second"]
    assert seconds >= 3 * (whole["time/rollout"] + whole["time/update"]) - 0.01


# --------------------------------------------------------------------------------------------------- completions


def test_each_table_of_completions_keeps_its_own(make_trainer, tmp_path, capsys):
    """Those of training under the names that TRL gives them; all rows of an evaluation beside them."""
    data = Dataset.from_list([{"prompt": f"countdown {row}", "number": float(row)} for row in range(5)])

    def noted(completions, number, log_extra, **kwargs):
        log_extra("twice", [2 * value for value in number])
        return number

    train = Dataset.from_list([{"prompt": f"sudoku {row}", "number": float(row)} for row in range(4)])
    trainer = make_trainer(
        reward_funcs=noted, dataset=train, kwargs={"eval_dataset": {"a/b": data, "other": data.select([2])}},
        num_generations_eval=2, per_device_eval_batch_size=4, max_steps=2, log_completions=True,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train()
    directory = tmp_path / "completions"
    names = {f"{name}_0000{step}.parquet" for name in ("completions", "eval_a_b", "eval_other") for step in (1, 2)}
    assert {path.name for path in directory.iterdir()} == names
    for step in (1, 2):
        training = pd.read_parquet(directory / f"completions_0000{step}.parquet")
        assert len(training) == 4 and training["prompt"].str.startswith("sudoku").all()
        evaluation = pd.read_parquet(directory / f"eval_a_b_0000{step}.parquet")
        assert list(evaluation.columns) == list(training.columns)
        assert Counter(evaluation["prompt"]) == {f"countdown {row}": 2 for row in range(5)}
        assert (evaluation["twice"] == 2 * evaluation["noted"]).all() and (evaluation["step"] == step).all()
        assert len(pd.read_parquet(directory / f"eval_other_0000{step}.parquet")) == 2
    shown = capsys.readouterr().out
    assert shown.index("sudoku") < shown.index("eval_a/b:") < shown.index("countdown")
    trainer.predict(data)
    assert len(pd.read_parquet(directory / "test_00002.parquet")) == 10
    assert {path.name for path in directory.iterdir()} == names | {"test_00002.parquet"}


def test_a_column_that_is_logged_now_and_then_is_left_out(make_trainer, tmp_path, caplog):
    def noted(completions, number, log_extra, **kwargs):
        if 0.0 in number:
            log_extra("sometimes", number)
        return number

    trainer = make_trainer(
        reward_funcs=noted, dataset=rows(4), kwargs={"eval_dataset": rows(3)}, num_generations_eval=1,
        per_device_eval_batch_size=1, log_completions=True,
    )  # fmt: skip
    trainer.evaluate()
    assert "sometimes" not in pd.read_parquet(tmp_path / "completions" / "eval_00000.parquet")
    assert "did not log 'sometimes' for every response" in caplog.text
