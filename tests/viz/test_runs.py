"""Pictures of runs show what their logs say, and nothing that did not happen."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.colors import to_hex

from tests.viz.conftest import SPEC, save
from tests.viz.test_plots import faces, longer
from trl_diffusion.commands import train
from trl_diffusion.commands.view import main
from trl_diffusion.utils import wilson
from trl_diffusion.viz.colours import CURVES, css
from trl_diffusion.viz.plots import plot_runs
from trl_diffusion.viz.runs import LEAST_KL, WIDTH, Run, describe, panels, read_run, short_names, spark


RESULTS = {"solve_rate_before": 0.1, "solve_rate_after": 0.6, "rows": 50, "steps": 8}
PAIRS = {
    "rewards/accuracies": 0.75,
    "rewards/chosen": -0.5,
    "rewards/rejected": -2.0,
    "losses/sft": 0.3,
    "losses/sigmoid": 0.5,
}


def logs(rollout: float = 1.5, **metrics: float | None) -> list[dict]:
    """Four logs of a run whose rewards are negative and rise, and a last one of the whole run."""
    rows = [
        {
            "step": 2 * n, "reward": -40.0 + n, "reward_std": 3.0, "rewards/short/mean": -50.0 + n, "rewards/neat/mean": 10.0,
            "completions/mean_length": 9.0, "completions/min_length": 4.0, "completions/max_length": 16.0 + n, "loss": 1 / n,
            "grad_norm": 0.5, "diffusion/effective_sample_size": 0.9, "diffusion/kl_to_old": 1e-9, "entropy": 0.2,
            "time/rollout": rollout, **metrics,
        }
        for n in range(1, 5)
    ]  # fmt: skip
    return [*rows, {"step": 8, "train_loss": 0.5}]


def titles(runs: list[Run]) -> list[str]:
    return [panel.title for panel in panels(runs)]


def write_run(directory: Path, log: list[dict], results: dict | None = None) -> str:
    directory.mkdir(parents=True)
    (directory / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    if results is not None:
        (directory / "results.json").write_text(json.dumps(results))
    return str(directory)


def test_six_panels_of_fresh_responses():
    run = Run("a", logs(kl=0.02), RESULTS)
    reward, held_out, divergence, size, norm, length = panels([run])
    total, *parts = reward.curves[0]
    assert (total.label, total.steps, total.values) == ("total", [2, 4, 6, 8], [-39.0, -38.0, -37.0, -36.0])
    assert total.low == [-42.0, -41.0, -40.0, -39.0] and total.high == [-36.0, -35.0, -34.0, -33.0]
    assert {part.label: part.values[0] for part in parts} == {"short": -49.0, "neat": 10.0}
    (rate,) = held_out.curves[0]
    assert (rate.steps, rate.values) == ([0, 8], [0.1, 0.6])
    assert list(zip(rate.low, rate.high, strict=True)) == [wilson(0.1, 50), wilson(0.6, 50)]
    assert [series.label for series in divergence.curves[0]] == ["from reference", "from old policy"]
    assert divergence.curves[0][0].values == [0.02] * 4
    assert size.curves[0][0].values == [0.9] * 4 and norm.curves[0][0].values == [0.5] * 4
    (tokens,) = length.curves[0]
    assert tokens.low == [4.0] * 4 and tokens.high == [17.0, 18.0, 19.0, 20.0]


def test_stored_responses_show_no_learning_that_did_not_happen():
    """Their rewards are those of the data, and rise or fall with the order of the rows."""
    group, pairs = Run("a", logs(0.0), RESULTS), Run("b", logs(0.0, kl=0.1, **PAIRS), RESULTS)
    assert not Run("c", logs(), RESULTS).stored and group.stored and pairs.stored
    assert not Run("d", [{"step": 1, "reward": 1.0}]).stored  # nothing says so
    assert not Run("e", [*logs(0.0), {"step": 9, "time/rollout": 2.0}]).stored  # every other step has a rollout
    common = ["loss", "held-out solve rate", "KL divergence per token, in nats"]
    assert titles([group]) == [*common, "effective sample size", "gradient norm", "entropy per token, in nats"]
    order = [*common, "pairs in the right order", "gradient norm", "implicit rewards of the pairs"]
    assert titles([pairs]) == titles([group, pairs]) == order
    loss, *_, ordered, _, implicit = panels([pairs])
    assert [series.label for series in loss.curves[0]] == ["total", "sft", "sigmoid"]
    assert ordered.curves[0][0].values == [0.75] * 4
    assert [series.values[0] for series in implicit.curves[0]] == [-0.5, -2.0]
    # Beside a run with fresh responses: no curve where it would show the data.
    reward, *_, length = panels([Run("c", logs(), RESULTS), group])
    assert reward.title == "reward" and len(reward.curves[0]) == 1 and reward.curves[1] == []
    assert length.curves[0] and length.curves[1] == []


def test_held_out_rows_are_found_in_whatever_the_run_left():
    def held_out(log: list[dict], results: dict | None = None):
        return panels([Run("a", log, results or {})])[1]

    evaluated = [{"step": 4, "eval_loss": 0.4, "eval_reward": -3.0, "eval_runtime": 2.0}]
    found = held_out([*logs(), *evaluated, {"step": 4, "eval_sudoku_solved": 0.25, "epoch": 1.0}])
    assert found.title == "held-out metrics" and [series.label for series in found.curves[0]] == ["sudoku_solved"]
    assert found.curves[0][0].values == [0.25]
    found = held_out([*logs(), *evaluated])
    assert found.title == "held-out reward" and found.curves[0][0].values == [-3.0]
    pairs = {"loss_before": 0.7, "loss_after": 0.2, "steps": 8}
    found = held_out([*logs(0.0), {"step": 4, "eval_loss": 0.4, "eval_runtime": 2.0}], pairs)
    (series,) = found.curves[0]
    assert found.title == "held-out loss" and (series.steps, series.values) == ([0, 4, 8], [0.7, 0.4, 0.2])
    assert held_out(logs()).curves == [[]]


def test_values_that_are_missing_or_not_finite_do_not_count():
    log = logs()
    log[0]["reward"], log[1]["reward_std"], log[2]["grad_norm"] = float("nan"), None, float("inf")
    del log[3]["completions/min_length"]
    reward, _, _, _, norm, length = panels([Run("a", log)])
    assert reward.curves[0][0].steps == [6, 8] and norm.curves[0][0].steps == [2, 4, 8]
    assert length.curves[0][0].steps == [2, 4, 6]
    assert all(math.isfinite(value) for value in reward.curves[0][0].values)


def test_picture_of_a_run(drawn, tmp_path):
    """Everything is inside of its panel: rewards below 0, too."""
    plot_runs([Run("runs/$a", logs(kl=0.02), RESULTS)], tmp_path / "run.png")
    path = save(drawn[0], tmp_path / "deep" / "run.png")
    assert path.read_bytes()[:4] == b"\x89PNG" and [file.name for file in path.parent.iterdir()] == ["run.png"]
    (figure,) = drawn
    assert figure.get_suptitle() == "runs/$a: 8 updates on fresh responses" and len(figure.axes) == 6
    assert figure.axes[0].get_title() == "reward (band: one standard deviation)"
    assert figure.axes[1].get_title() == "held-out solve rate (95 % interval)"
    for axes in figure.axes:
        low, high = axes.get_ylim()
        values = [value for line in axes.lines for value in line.get_ydata()]
        assert values and low <= min(values) and max(values) <= high
    reward, held_out, divergence, size, *_ = figure.axes
    assert reward.get_ylim()[0] <= -50 and [round(y) for y in reward.lines[0].get_ydata()] == [-39, -38, -37, -36]
    (band,) = reward.collections
    assert band.get_datalim(reward.transData).get_points()[:, 1].tolist() == [-42.0, -33.0]
    ((_, _, (bars,)),) = [container.lines for container in held_out.containers]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [
        pytest.approx(list(wilson(rate, 50)), rel=1e-6) for rate in (0.1, 0.6)
    ]
    assert [text.get_text() for text in divergence.get_legend().get_texts()] == ["from reference", "from old policy"]
    assert size.get_ylim() == (0.0, 1.05) and divergence.get_ylim()[0] == 0.0
    # What is missing is said, and rounding looks like 0.
    plot_runs([Run("b", [{"step": 1, "diffusion/kl_to_old": -1e-10}])], tmp_path / "empty.png")
    said = [[text.get_text() for text in axes.texts] for axes in drawn[1].axes]
    assert said == [["not logged"], ["not logged"], [], ["not logged"], ["not logged"], ["not logged"]]
    assert drawn[1].axes[2].get_ylim() == (0.0, LEAST_KL)


def test_picture_of_several_runs(drawn, tmp_path):
    fresh, stored = Run("out/one/a", logs(kl=0.1), RESULTS), Run("out/two/a", logs(0.0, kl=0.2), RESULTS)
    plot_runs([fresh, stored], tmp_path / "runs.png")
    (figure,) = drawn
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one/a", "two/a (stored responses)"]
    kinds = [(to_hex(line.get_color()), line.get_marker()) for line in legend.get_lines()]
    assert kinds == [(css(CURVES[0]), "o"), (css(CURVES[1]), "s")]
    reward, _, divergence, *_ = figure.axes
    assert [line.get_marker() for line in reward.lines] == ["o"]
    assert [(line.get_marker(), line.is_dashed()) for line in divergence.lines] == [
        ("o", False), ("o", True), ("s", False), ("s", True)
    ]  # fmt: skip
    plot_runs([Run(f"out/round_{n}", logs()) for n in range(9)], tmp_path / "many.png")
    assert len({to_hex(line.get_color()) for line in drawn[1].legends[0].get_lines()}) == 9
    assert short_names(["out/run", "out/run/checkpoint-5"]) == ["run", "checkpoint-5"] and short_names(["a"]) == ["a"]
    with pytest.raises(ValueError, match="There is no run to draw"):
        plot_runs([], tmp_path / "none.png")


def test_a_run_in_words():
    words = describe(Run("a", logs(), RESULTS)).splitlines()
    assert words[0] == "a: 8 updates on fresh responses" and len(words) == 9
    assert words[1].split() == ["reward,", "total", "-39", "▁▃▆█", "-36"]
    assert words[4].split() == "held-out solve rate 10.0% (4.3% to 21.4%) ▂▅ 60.0% (46.2% to 72.4%)".split()
    assert words[5].split()[-3:] == ["0", "▁▁▁▁", "0"]  # rounding
    assert describe(Run("b", [])).splitlines()[1].split() == ["reward", "not", "logged"]
    assert spark([1.0] * 3) == "▁▁▁" and spark(range(1000)) == "".join(sorted(spark(range(1000)))) and WIDTH == 24
    assert len(spark(range(1000))) == WIDTH and spark([0.5], 0.0, 1.0) == "▅"


def test_runs_are_read_from_where_they_are(tmp_path):
    whole = write_run(tmp_path / "whole", logs(), RESULTS)
    run = read_run(whole)
    assert (run.name, run.updates, run.results) == (whole, 8, RESULTS)
    for step in (9, 10):
        write_run(tmp_path / "halted" / f"checkpoint-{step}", [{"step": step}])
    (tmp_path / "halted" / "results.json").write_text(json.dumps(RESULTS))  # of the run before
    assert (read_run(tmp_path / "halted").updates, read_run(tmp_path / "halted").results) == (10, {})


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["empty"], "empty is not a run: neither it nor a checkpoint in it has a trainer_state.json. If it holds "
                    "trajectories, say which row: trl-diffusion view empty 0"),
        (["whole", "empty"], "There is no run in empty: neither it nor a checkpoint in it has a trainer_state.json."),
        (["empty", "1", "2"], "empty is not a run, and takes one row, got ['1', '2']."),
        (["empty", "first"], "ROW must be a whole number, got 'first'."),
        (["whole", "--output", "run.html"], "--output of a run must end in .png, got run.html."),
        (["whole", "--response", "0"], "whole is a run, for which --response means nothing."),
        (["cut"], "cut/trainer_state.json is not JSON"),
        (["odd"], "odd/trainer_state.json: `log_history` must be a list of objects, each with its `step`."),
        (["bad"], "bad/results.json must hold a JSON object, got [1]."),
    ],
)  # fmt: skip
def test_command_says_what_is_wrong_with_a_run(arguments, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(Path("whole"), logs(), RESULTS)
    Path("empty").mkdir()
    Path(write_run(Path("cut"), logs()), "trainer_state.json").write_text('{"log_hi')
    write_run(Path("odd"), [{"reward": 1.0}])
    write_run(Path("bad"), logs(), [1])
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and problem in err
    assert not list(tmp_path.glob("*.png"))


def test_command_draws_and_prints_runs(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(Path("one"), logs(), RESULTS)
    write_run(Path("two"), logs(0.0))
    assert main(["one"]) == 0
    assert capsys.readouterr().out == f"run.png\n{describe(read_run('one'))}\n"
    assert main(["one", "two"]) == 0
    assert capsys.readouterr().out == f"runs.png\n{describe(read_run('one'))}\n{describe(read_run('two'))}\n"
    assert [len(figure.axes) for figure in drawn] == [6, 6] and len(drawn[1].legends) == 1

    def missing(*arguments):
        raise ImportError("Pictures need matplotlib")

    monkeypatch.setattr("trl_diffusion.commands.view.plot_runs", missing)
    assert main(["one"]) == 0
    assert capsys.readouterr().out == f"{describe(read_run('one'))}\nNo picture was drawn: Pictures need matplotlib\n"
    assert main(["one", "--output", "mine.png"]) == 2


def test_training_leaves_pictures_that_can_be_opened(answer, tokenizer, drawn, tmp_path):
    """Of an answer whose picture would be too large, the first positions; and it says so."""
    trainer = SimpleNamespace(
        state=SimpleNamespace(log_history=logs()), spec=SPEC, processing_class=tokenizer,
        args=SimpleNamespace(output_dir=str(tmp_path)),
    )  # fmt: skip
    assert train.draw(trainer, RESULTS, answer, "sudoku 31") == ["run.png", "denoising.png"]
    assert drawn[1].axes[0].get_title() == "sudoku 31"
    said = train.draw(trainer, RESULTS, longer(answer, 20), [{"role": "user", "content": "?"}])
    assert said == ["run.png", "denoising.png (the first 64 positions of an answer)"]
    assert faces(drawn[3].axes[0]).shape[1] == 64
    assert train.draw(trainer, {"loss_before": 1.0}) == ["run.png"]
