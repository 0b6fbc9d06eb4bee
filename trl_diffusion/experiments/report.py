"""What came out of a comparison: tables in Markdown, and pictures. Everything is computed from its rows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..utils import half_width, read_text, wilson, write_text
from .arms import ARMS, TOKENS_PER_PASS
from .comparison import CHOOSE, PRETRAIN, REINFORCE, at_training
from .queue import ROWS, TABLE, Row


MEASURED = ("before", "updates", "seconds")
_KEYS = ("kind", "seed", "plan")
_OF_COMPARISONS = ("variant", "task", "what")
AFTERWARDS, ADAPTIVE = ", revising only when measured", ", adaptive"


def read_rows(path: Path) -> list[Row]:
    """
    The rows of a comparison.

    Args:
        path (`Path`): its directory, or a `.jsonl` file with a row on each line.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: naming the file, if there are no rows, or a row is damaged.
    """
    if path.is_dir():
        lines = [(str(file), read_text(file)) for file in sorted((path / ROWS).glob("*.json"))]
    else:
        lines = [(f"{path}, line {n}", line) for n, line in enumerate(read_text(path).splitlines(), start=1)]
    rows: list[Row] = []
    for where, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not a row of a study, got {row!r:.80}.")
        keys = _KEYS + (_OF_COMPARISONS if row.get("kind") in (PRETRAIN, CHOOSE, REINFORCE) else ())
        if missing := [key for key in keys if key not in row]:
            raise ValueError(f"{where}: not a row of a study, it lacks {missing}.")
        if rows and row["plan"] != rows[0]["plan"]:
            raise ValueError(
                f"{where}: a row of another study than those before ({row['plan']}, not {rows[0]['plan']})."
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows of a study.")
    return rows


@dataclass(frozen=True)
class Estimate:
    """
    A mean over seeds.

    Attributes:
        values (`tuple[float, ...]`): the value of each seed.
        half (`float`): largest distance of the mean to an end of its 95 % interval: over seeds, or over puzzles if there is one seed.
    """

    values: tuple[float, ...]
    half: float

    @property
    def mean(self) -> float:
        return fmean(self.values)

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.half:.1f}"


def estimate(shares: Sequence[float], puzzles: int) -> Estimate:
    """A share of solved puzzles, from the share of each seed. `puzzles`: puzzles of each seed."""
    if len(shares) > 1:
        return Estimate(tuple(shares), half_width(shares))
    low, high = wilson(shares[0], puzzles)
    return Estimate(tuple(shares), max(high - shares[0], shares[0] - low))


def verdict(differences: Sequence[float]) -> str:
    """
    What differences, one for each seed, say: `"+3.1 ± 1.2"`, followed by "undecided" if the 95 % interval of their mean includes 0. One
    seed decides nothing.
    """
    mean = 100 * fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.1f} (one seed: undecided)"
    half = 100 * half_width(differences)
    return f"{mean:+.1f} ± {half:.1f}" + (" (undecided)" if abs(mean) <= half else "")


class Results:
    """
    The rows of a comparison, by what they are about.

    Args:
        rows (`Iterable[dict]`): rows of any kinds.
    """

    def __init__(self, rows: Iterable[Row]):
        self.rows = list(rows)
        self.twins = self._by(PRETRAIN)
        self.runs = self._by(REINFORCE)
        self.tasks = list(dict.fromkeys(row["task"] for row in self.rows if row["kind"] == REINFORCE))
        self.arms = [arm for arm in ARMS if any(arm == what for _, what in self.runs)]

    def _by(self, kind: str) -> dict[tuple[str, str], list[Row]]:
        found = defaultdict(list)
        for row in sorted(self.rows, key=lambda row: row["seed"]):
            if row["kind"] == kind:
                found[row["task"], row["what"]].append(row)
        return found

    def seeds(self, task: str, arm: str) -> list[int]:
        """Seeds of the runs of an arm on a task."""
        return [row["seed"] for row in self.runs.get((task, arm), [])]

    def at(self, task: str, arm: str, when: str, temperature: float) -> dict[int, Row]:
        """By seed, what was measured at the settings of training. `when`: one of `MEASURED`."""
        found = {}
        for row in self.runs.get((task, arm), []):
            found[row["seed"]] = at_training(points_of(row, when), row["training"], temperature)
        return found

    def one_token_a_pass(self, task: str, arm: str, temperature: float) -> dict[int, Row]:
        """By seed, what was measured after equal updates with as many forward passes as tokens."""
        return {
            row["seed"]: _slowest(
                [point for point in points_of(row, "updates") if point["temperature"] == temperature]
            )
            for row in self.runs.get((task, arm), [])
        }


def _slowest(points: list[Row]) -> Row:
    """Of points with fixed numbers of passes, the one with most."""
    return max((point for point in points if "threshold" not in point["settings"]), key=lambda point: point["passes"])


def points_of(row: Row, when: str) -> list[Row]:
    """What a run measured at one time."""
    return row[when] if when in ("before", "revision_at_test") else row[when]["points"]


def within(points: list[Row], temperature: float, passes: float, adaptive: bool) -> Row | None:
    """
    The point that stands for an arm at a limit of forward passes, or `None` if every point takes more.

    Args:
        points (`list[dict]`): what was measured.
        temperature (`float`): of the samples.
        passes (`float`): most forward passes of an answer, on average.
        adaptive (`bool`): `True`: of the thresholds, the one that solves most validation rows. `False`: of the fixed numbers of
            passes, the largest.
    """
    fitting = [
        one
        for one in points
        if one["temperature"] == temperature and one["passes"] <= passes + 1e-6 and ("validation" in one) == adaptive
    ]
    return max(fitting, key=lambda one: one["validation" if adaptive else "passes"], default=None)


# ----------------------------------------------------------------------------------------------------------- tables


def table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def twins_table(results: Results, task: str) -> str:
    """How the twins of a task were pretrained, on average over seeds."""
    lines = []
    for (name, twin), rows in results.twins.items():
        rows = [row for row in rows if row["seed"] in {s for arm in results.arms for s in results.seeds(task, arm)}]
        if name == task and rows:
            mean = {key: fmean(row[key] for row in rows) for key in ("parameters", "updates", "documents", "tokens", "answer_tokens", "flops", "seconds", "loss")}  # fmt: skip
            lines.append([twin.replace("_", ", "), *(f"{mean[key]:,.0f}" for key in ("parameters", "updates", "answer_tokens")),
                          f"{mean['flops'] / 1e12:.3g}", f"{mean['seconds']:.0f}"])  # fmt: skip
    header = ["twin", "parameters", "updates", "answer tokens", "10^12 operations", "core seconds"]
    return table(header, lines)


def solve_table(results: Results, task: str) -> str:
    """Solve rates at the settings of training, at three times and two temperatures."""
    lines = []
    for arm in results.arms:
        rows = results.runs.get((task, arm), [])
        if not rows:
            continue
        cells = [_rate(results.at(task, arm, when, t), rows) for when in MEASURED for t in (0.0, 1.0)]
        points = results.at(task, arm, "updates", 1.0).values()
        passes, cost = (fmean(point[key] for point in points) for key in ("passes", "seconds_per_1000"))
        seconds = fmean(_seconds_of_updates(row) for row in rows)
        counts = fmean(row["seconds"]["updates"] for row in rows)
        lines.append([arm, f"{passes:.1f}", f"{cost:.1f}", *cells, f"{seconds:.0f}", f"{counts:.0f}"])
    header = ["arm", "passes", "core seconds of 1,000 answers"]
    header += [f"{when}, T = {t}" for when in ("before", "equal updates", "equal seconds") for t in (0, 1)]
    return table([*header, "core seconds of the updates", "updates in the seconds"], lines)


def _rate(found: dict[int, Row], rows: list[Row]) -> str:
    return str(estimate([point["solved"] for point in found.values()], rows[0]["puzzles"]))


def _seconds_of_updates(row: Row) -> float:
    return row["seconds_after"][row["updates"]["updates"] - 1]


def differences_table(results: Results, task: str, rival: str) -> str:
    """
    Differences to a rival after training, in percentage points, paired by seed: at the settings of training after equal updates and after
    equal seconds, and after equal updates with one token a forward pass.
    """
    lines = []
    for arm in results.arms:
        if arm == rival:
            continue
        cells = []
        for found in (
            lambda name, t: results.at(task, name, "updates", t),
            lambda name, t: results.at(task, name, "seconds", t),
            lambda name, t: results.one_token_a_pass(task, name, t),
        ):
            for temperature in (0.0, 1.0):
                own, other = found(arm, temperature), found(rival, temperature)
                both = sorted(own.keys() & other.keys())
                cells.append(verdict([own[seed]["solved"] - other[seed]["solved"] for seed in both]) if both else "")
        if any(cells):
            lines.append([arm, *cells])
    header = [f"arm, minus {rival}"]
    header += [f"{when}, T = {t}" for when in ("equal updates", "equal seconds", "one token a pass") for t in (0, 1)]
    return table(header, lines)


def curves(results: Results, task: str, temperature: float) -> dict[str, dict[int, Estimate]]:
    """
    Solve rates after equal updates by forward passes, for each arm and way to spend them: fixed numbers of passes, adaptive
    unmasking, and revision only when measured.
    """
    found: dict[str, dict[int, Estimate]] = {}
    for arm in results.arms:
        rows = results.runs.get((task, arm), [])
        if not rows:
            continue
        for name, when, adaptive in ((arm, "updates", False), (arm + ADAPTIVE, "updates", True),
                                     (arm + AFTERWARDS, "revision_at_test", False)):  # fmt: skip
            measured = [points_of(row, when) for row in rows if when in row]
            if not measured:
                continue
            curve: dict[int, Estimate] = {}
            for limit in limits(rows[0]["length"]):
                points = [within(points, temperature, limit, adaptive) for points in measured]
                chosen = [point for point in points if point is not None]
                if len(chosen) == len(measured):
                    curve[limit] = estimate([point["solved"] for point in chosen], rows[0]["puzzles"])
            if curve:
                found[name] = curve
    return found


def limits(length: int) -> list[int]:
    """Limits of forward passes for answers of so many tokens, up to one token a pass."""
    return sorted({1, 2, 3, 4, 6, 8, 12, length} - set(range(length + 1, 13)))


def curves_table(results: Results, task: str, temperature: float) -> str:
    """Solve rates by the largest number of forward passes."""
    found = curves(results, task, temperature)
    every = sorted({limit for curve in found.values() for limit in curve})
    lines = [[name, *(curve.get(limit, "") for limit in every)] for name, curve in found.items()]
    return table(["arm", *(f"at most {limit}" for limit in every)], lines)


def samples_table(results: Results, task: str) -> str:
    """pass@k at the settings of training, before and after."""
    lines, sizes = [], []
    for arm in results.arms:
        rows = results.runs.get((task, arm), [])
        if rows:
            sizes = sorted(rows[0]["pass_at_k"], key=int)
            lines.append([arm, *(estimate([row[when][k] for row in rows], rows[0]["puzzles"]) for k in sizes
                                 for when in ("before_pass_at_k", "pass_at_k"))])  # fmt: skip
    return table(["arm", *(f"pass@{k} {when}" for k in sizes for when in ("before", "after"))], lines)


def learning_rates_table(results: Results) -> str:
    """The validation solve rate of every learning rate that was tried."""
    tried: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    for row in results.rows:
        if row["kind"] == CHOOSE:
            tried[row["task"], row["what"]][row["learning_rate"]] = row["validation"]
    rates = sorted({rate for found in tried.values() for rate in found})
    lines = []
    for (task, arm), found in tried.items():
        best = max(found, key=lambda rate: (found[rate], -rate))
        lines.append([task, arm, *((f"**{found[r]:.1%}**" if r == best else f"{found[r]:.1%}") if r in found else "" for r in rates)])  # fmt: skip
    return table(["task", "arm", *(f"{rate:g}" for rate in rates)], lines)


# ----------------------------------------------------------------------------------------------------------- report


def report(rows: Iterable[Row], pictures: Iterable[str] = ()) -> str:
    """
    The report of a comparison, in Markdown.

    Args:
        rows (`Iterable[dict]`): the rows.
        pictures (`Iterable[str]`): file names of pictures to show.
    """
    results = Results(rows)
    parts = [f"![{name}]({name})" for name in pictures]
    parts.append(
        "Solve rates are percentages with 95 % intervals: over seeds by Student's t distribution, or over puzzles if there is one "
        "seed. T is the temperature of the answers. A difference whose interval includes 0 is undecided. The settings of training are "
        f"{TOKENS_PER_PASS} tokens a forward pass; the autoregressive arm writes one. Passes do not cost the same: with full attention each "
        "computes the whole answer and the prompt, and the autoregressive arm has a cache. All seeds are measured on the same puzzles, and "
        "nothing is corrected for the number of comparisons."
    )
    for task in results.tasks:
        seeds = sorted({seed for arm in results.arms for seed in results.seeds(task, arm)})
        parts += [f"## {task}", f"Seeds: {', '.join(map(str, seeds))}.", twins_table(results, task),
                  "At the settings of training:", solve_table(results, task)]  # fmt: skip
        for rival in ("autoregressive", "full"):
            if results.seeds(task, rival):
                parts += [differences_table(results, task, rival)]
        for temperature in (0.0, 1.0):
            parts += [f"After equal updates, by forward passes, T = {temperature:g}:",
                      curves_table(results, task, temperature)]  # fmt: skip
        parts += ["Several answers at T = 1:", samples_table(results, task)]
    chosen = learning_rates_table(results)
    if chosen.count("\n") > 1:
        parts += ["## Learning rates", "Share of validation puzzles solved with the seed that chooses:", chosen]
    return "\n\n".join(parts) + "\n"


def write_report(rows: list[Row], directory: Path) -> list[str]:
    """
    Writes `report.md`, `rows.jsonl`, and pictures if matplotlib is there. Returns their names.

    Args:
        rows (`list[dict]`): the rows of one study.
        directory (`Path`): where to write.
    """
    from .pictures import draw, draw_scaling
    from .scaling import scaling_report
    from .updates_report import updates_report

    pictures: list[str] = []
    ordered = sorted(rows, key=lambda row: json.dumps([row["kind"], row["seed"], *map(str, row.values())]))
    write_text(directory / TABLE, "".join(json.dumps(row) + "\n" for row in ordered))
    if not any(row["kind"] in (PRETRAIN, CHOOSE, REINFORCE) for row in rows):
        title, text = "Aggressive updates", updates_report(ordered)
    elif any(row["variant"] for row in rows):
        pictures = draw_scaling(ordered, directory)
        title, text = "Scaling", scaling_report(ordered, pictures)
    else:
        pictures = draw(Results(ordered), directory)
        title, text = "Comparison", report(ordered, pictures)
    write_text(directory / "report.md", f"# {title}\n\n{text}")
    return ["report.md", *pictures, TABLE]
