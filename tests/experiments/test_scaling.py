"""The fits of the scaling study, and the signs of the study of aggressive updates."""

import math
import random
from statistics import fmean

import pytest

from trl_diffusion.experiments.scaling import fit, log_odds, scaling, scaling_report
from trl_diffusion.experiments.settings import Sizes
from trl_diffusion.experiments.updates import Updates, _rounded
from trl_diffusion.experiments.updates_report import Sign, TrainerWarning, _fall, broke, updates_report
from trl_diffusion.trainer.health import FAR, reward_fell, signs_of


def test_a_line_through_points_on_it():
    line = fit([(x, 2 * x - 1) for x in (1.0, 2.0, 4.0)])
    assert (line.slope, line.intercept) == (pytest.approx(2), pytest.approx(-1))
    assert line.half == pytest.approx(0, abs=1e-12, rel=1e-12)
    assert line.ends == (1.0, 4.0)
    with pytest.raises(ValueError, match="three points"):
        fit([(1.0, 2.0), (2.0, 3.0)])


def test_the_interval_of_a_slope_covers_it_19_times_out_of_20():
    rng, covered = random.Random(0), []
    for _ in range(1000):
        line = fit([(x, 0.5 * x + rng.gauss(0, 1)) for x in (1, 2, 3, 4, 5, 6)])
        covered.append(abs(line.slope - 0.5) <= line.half)
    assert abs(fmean(covered) - 0.95) < 4 * math.sqrt(0.05 * 0.95 / 1000)


def test_log_odds_are_finite_and_symmetric():
    assert log_odds(0.5, 100) == 0
    assert log_odds(1.0, 100) == pytest.approx(-log_odds(0.0, 100))
    assert log_odds(0.75, 10_000) == pytest.approx(math.log(3), rel=1e-3)


def test_every_size_and_amount_of_data_is_a_variant():
    comparison = scaling(Sizes(), shapes=((32, 2), (64, 3)))
    assert len(comparison.variants) == 6
    sizes = comparison.variants["32x2-0.5"]
    assert (sizes.hidden_size, sizes.num_layers, sizes.pretrain_updates) == (32, 2, Sizes().pretrain_updates // 2)
    assert len({job.name for job in comparison.jobs()}) == len(comparison.jobs())


def scaling_rows():
    rows = []
    for number, width in enumerate((32, 64, 128)):
        variant = f"{width}x2-1"
        rows.append(
            {
                "kind": "pretrain",
                "plan": "p",
                "variant": variant,
                "task": "chain",
                "what": "full",
                "seed": 0,
                "parameters": 10**number,
            }
        )
        for seed in (0, 1):
            points = [{"temperature": 1.0, "settings": {}, "solved": 1 / (1 + math.exp(-number)), "passes": 5.0}]
            rows.append({"kind": "reinforce", "plan": "p", "variant": variant, "task": "chain", "what": "full", "seed": seed, "training": {},
                         "puzzles": 10**9, "before": points, "marks": [], "updates": {"updates": 40, "points": points}})  # fmt: skip
    return rows


def test_the_slope_of_a_report_is_that_of_the_log_odds():
    lines = [line for line in scaling_report(scaling_rows()).splitlines() if line.startswith("| chain")]
    assert len(lines) == 2  # before reinforcement, and after 40 updates
    assert all("| +1.00 ± 0.00 |" in line for line in lines)


def test_there_are_at_least_24_settings():
    study = Updates(seeds=(0, 1))
    jobs = study.jobs()
    assert len({job.settings for job in jobs if job.settings}) >= 24
    assert len({job.name for job in jobs}) == len(jobs)
    assert all(jobs.index(needed) < jobs.index(job) for job in jobs for needed in study.needs(job))


def update_row(kind, rates, seed=0, **signs):
    curve = [[6 * i, rate] for i, rate in enumerate(rates)]
    return {"kind": kind, "seed": seed, "settings": [["learning_rate", 1e-3]], "curve": curve, "puzzles": 200, "diverged": None,
            "signs": {name.replace("__", "/"): values for name, values in signs.items()}}  # fmt: skip


def test_a_run_that_falls_is_broken():
    assert broke(update_row("group", [0.1, 0.6, 0.4]))
    assert broke({**update_row("group", [0.1, 0.6, 0.6]), "diverged": "NaN"})
    assert broke(update_row("group", [0.08, 0.0, 0.0]))  # 16 of 200 puzzles, and none
    assert not broke(update_row("group", [0.1, 0.6, 0.5]))  # by a sixth
    assert not broke(update_row("group", [0.02, 0.01]))  # four puzzles and two


def test_a_fall_is_not_a_rate_that_stays():
    assert _fall(update_row("group", [0.1, 0.6, 0.6, 0.3])) == 18
    assert _rounded(math.inf) > 1e300 and _rounded(None) is None and _rounded(0.123456) == 0.1235


def test_what_the_trainer_would_have_said_is_a_sign():
    far = update_row(
        "group", [0.1, 0.0], diffusion__kl_to_old=[0.0, 0.1, FAR + 0.1, 0.0], reward=[1.0, None, None, None]
    )
    warnings = {str(sign): sign.first(far) for sign in map(TrainerWarning, signs_of("grpo", online=True))}
    assert warnings == {"the trainer warns: `moved_far`": 3, "the trainer warns: `reward_fell`": None}
    fallen = update_row("group", [0.6, 0.0], reward=[1.0, 1.1, 0.9, 1.0, 1.1, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert TrainerWarning(reward_fell).first(fallen) == 10


def test_a_sign_counts_if_it_comes_before_the_fall():
    alarm = Sign("rewards/chosen", -1.0, above=False)
    assert alarm.first(update_row("pairs", [0.1], rewards__chosen=[0.0, None, -0.9, -1.5, -2.0])) == 4
    assert alarm.first(update_row("pairs", [0.1], rewards__chosen=[0.0, 1.0])) is None
    assert alarm.first(update_row("pairs", [0.1])) is None
    early = update_row("pairs", [0.1, 0.6, 0.2], rewards__chosen=[0.0] * 7 + [-2.0] * 5)  # at update 8, measured at 12
    late = update_row("pairs", [0.1, 0.6, 0.2, 0.1], rewards__chosen=[0.0] * 12 + [-2.0] * 6)
    fine = update_row("pairs", [0.1, 0.6, 0.6], rewards__chosen=[-2.0] * 12)
    text = updates_report([early, late, fine])
    assert "| `rewards/chosen` below -1 | 1 of 2 | 2 of 2 | 1 of 1 |" in text
    assert "| 0.001 | 10.0 ± 0.0 |" in text and "| 2 of 3 |" in text
