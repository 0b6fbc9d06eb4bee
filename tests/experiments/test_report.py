"""What a report says, from rows that were made up."""

import json
from pathlib import Path
from statistics import fmean

import pytest

from trl_diffusion.experiments.comparison import at_training
from trl_diffusion.experiments.report import (
    Results,
    curves,
    estimate,
    read_rows,
    report,
    table,
    verdict,
    within,
    write_report,
)
from trl_diffusion.utils import half_width


STUDIES = Path(__file__).resolve().parents[2] / "benchmarks" / "studies"


def point(temperature, settings, solved, passes, **more):
    return {"temperature": temperature, "settings": settings, "solved": solved, "passes": passes, "tokens": 9.0,
            "seconds_per_1000": 1.0, **more}  # fmt: skip


def run(arm, seed, after, before=0.1, task="chain"):
    training = {} if arm == "autoregressive" else {"steps_per_block": 5}
    points = [point(t, training, after, 9.0 if arm == "autoregressive" else 5.0) for t in (0.0, 1.0)]
    return {
        "kind": "reinforce", "plan": "p", "variant": "", "task": task, "what": arm, "seed": seed, "learning_rate": 1e-3, "training": training, "length": 9,
        "puzzles": 100, "before": [{**one, "solved": before} for one in points], "updates": {"updates": 2, "points": points},
        "seconds": {"updates": 3, "points": points}, "pass_at_k": {"1": after, "2": after}, "before_pass_at_k": {"1": 0.0, "2": 0.1},
        "rewards": [0.1, 0.2, 0.3], "seconds_after": [1.0, 2.5, 4.0],
    }  # fmt: skip


def test_the_interval_of_a_mean_is_students():
    # 3 values with mean 2 and standard deviation 1: 4.303 / sqrt(3)
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(2.484, rel=1e-3)
    assert half_width([1.0, 1.0]) == 0
    with pytest.raises(ValueError, match="at least two"):
        half_width([1.0])


@pytest.mark.parametrize(
    "differences, said",
    [
        ([0.1], "+10.0 (one seed: undecided)"),
        ([0.1, 0.1, 0.1], "+10.0 ± 0.0"),
        ([0.01, 0.02, 0.03], "+2.0 ± 2.5 (undecided)"),
        ([-0.10, -0.11, -0.12], "-11.0 ± 2.5"),
        ([0.0, 0.0], "+0.0 ± 0.0 (undecided)"),
    ],
)
def test_a_difference_whose_interval_includes_0_is_undecided(differences, said):
    assert verdict(differences) == said


def test_one_seed_has_an_interval_over_puzzles():
    assert str(estimate([0.5], 100)) == "50.0 ± 9.6"  # Wilson's interval: 40.4 to 59.6
    assert str(estimate([0.0], 250)) == "0.0 ± 1.5"  # 0 to 1.5
    assert estimate([0.4, 0.6], 100).half == pytest.approx(12.706 * 0.1414 / 2**0.5, rel=1e-3)


def test_differences_are_paired_by_seed():
    rows = [run("autoregressive", 0, 0.2), run("autoregressive", 1, 0.6), run("autoregressive", 2, 0.9),
            run("full", 0, 0.3), run("full", 1, 0.7)]  # fmt: skip
    text = report(rows)
    assert (
        "| full | +10.0 ± 0.0 | +10.0 ± 0.0 | +10.0 ± 0.0 | +10.0 ± 0.0 | +10.0 ± 0.0 |" in text
    )  # not the difference of the means over different seeds
    assert "Seeds: 0, 1, 2." in text


def test_the_table_of_solve_rates():
    rows = [run("full", seed, rate, before=0.1) for seed, rate in enumerate((0.3, 0.5))]
    line = next(line for line in report(rows).splitlines() if line.startswith("| full | 5.0 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:4] == ["1.0", "10.0 ± 0.0"]
    assert cells[5].startswith("40.0 ± ")
    assert cells[9:] == ["2", "3"]  # seconds after the second update, 2.5, and the updates of the seconds


def test_thresholds_are_chosen_with_validation_rows():
    points = [
        point(0.0, {"threshold": 0.5}, 0.9, 3.0, validation=0.2),
        point(0.0, {"threshold": 0.9}, 0.6, 4.0, validation=0.8),
        point(0.0, {"threshold": 0.99}, 0.7, 7.0, validation=0.9),
        point(0.0, {"steps_per_block": 2}, 0.4, 2.0),
        point(0.0, {"steps_per_block": 4}, 0.3, 4.0),
        point(1.0, {"steps_per_block": 3}, 1.0, 3.0),
    ]
    assert within(points, 0.0, 4, adaptive=True)["solved"] == 0.6
    assert within(points, 0.0, 9, adaptive=True)["solved"] == 0.7
    assert within(points, 0.0, 4, adaptive=False)["solved"] == 0.3  # the most passes, not the most solved
    assert within(points, 0.0, 3, adaptive=False)["solved"] == 0.4
    assert within(points, 0.0, 1, adaptive=False) is None


def test_curves_leave_out_limits_that_some_seed_cannot_keep():
    rows = [run("full", 0, 0.3), run("full", 1, 0.5)]
    rows[0]["updates"]["points"].append(point(0.0, {"steps_per_block": 2}, 0.2, 2.0))
    found = curves(Results(rows), "chain", 0.0)["full"]
    assert set(found) == {6, 8, 9}
    assert found[6].mean == pytest.approx(fmean([0.3, 0.5]))


def test_a_report_is_made_again_from_its_own_rows(tmp_path):
    rows = [
        run(arm, seed, 0.4 + 0.1 * seed) for arm in ("autoregressive", "full", "full, revising") for seed in (0, 1, 2)
    ]
    names = write_report(rows, tmp_path)
    assert {"report.md", "rows.jsonl"} <= set(names)
    again = tmp_path / "again"
    again.mkdir()
    write_report(read_rows(tmp_path / "rows.jsonl"), again)
    for name in ("report.md", "rows.jsonl"):
        assert (again / name).read_text() == (tmp_path / name).read_text()
    for name in set(names) - {"report.md", "rows.jsonl"}:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text, said", [("", "no rows"), ("{", "line 1: not JSON"), ("[1]\n", "line 1: not a row"),
                                        ('{"kind": "x"}\n', "line 1: not a row.*lacks")])  # fmt: skip
def test_damaged_rows_are_named(tmp_path, text, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"rows.jsonl.*{said}"):
        read_rows(path)


def test_a_table_is_markdown():
    assert table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"
    assert json.dumps(table(["a"], [])) == json.dumps("| a |\n| --- |")


def test_rows_of_two_studies_are_not_reported_together(tmp_path):
    path = tmp_path / "rows.jsonl"
    other = {**run("full", 1, 0.4), "plan": "q"}
    path.write_text(json.dumps(run("full", 0, 0.4)) + "\n" + json.dumps(other) + "\n")
    with pytest.raises(ValueError, match=r"line 2: a row of another study than those before \(q, not p\)"):
        read_rows(path)


def test_rows_of_the_other_studies_are_reported(tmp_path):
    curve = [[0, 0.1], [6, 0.5]]
    row = {"kind": "group", "plan": "p", "seed": 0, "settings": [["beta", 0.0]], "curve": curve, "signs": {}, "puzzles": 100,
           "diverged": None}  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert write_report(read_rows(path), tmp_path) == ["report.md", "rows.jsonl"]
    assert "| 0 | 10.0 ± " in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("name", sorted(path.name for path in STUDIES.iterdir() if path.is_dir()))
def test_the_report_that_is_kept_is_that_of_its_rows(name, tmp_path):
    """In the repository are the rows of what was run, and what one command makes of them."""
    pytest.importorskip("matplotlib", reason="needs the extra `viz`")
    write_report(read_rows(STUDIES / name / "rows.jsonl"), tmp_path)
    assert (tmp_path / "report.md").read_text() == (STUDIES / name / "report.md").read_text()
    for picture in tmp_path.glob("*.png"):
        assert (STUDIES / name / picture.name).is_file()


def test_every_way_of_an_arm_has_its_colour():
    """Also where the name of one arm begins as that of another: `full, revising only when measured` is the arm `full`."""
    pictures = pytest.importorskip("trl_diffusion.experiments.pictures", reason="needs the extra `viz`")
    results = Results([run("full", 0, 0.5), run("full, revising", 0, 0.5)])
    styles = {name: pictures._style(results, name)["color"] for name in
              ("full", "full, adaptive", "full, revising only when measured", "full, revising")}  # fmt: skip
    assert styles["full"] == styles["full, adaptive"] == styles["full, revising only when measured"]
    assert styles["full"] != styles["full, revising"]


def test_what_is_compared_before_and_after_has_the_settings_of_training():
    points = [point(1.0, {"steps_per_block": 9}, 0.9, 9.0), point(0.0, {"steps_per_block": 5}, 0.3, 5.0),
              point(1.0, {"steps_per_block": 5}, 0.2, 5.0)]  # fmt: skip
    assert at_training(points, {"steps_per_block": 5}, 1.0)["solved"] == 0.2
