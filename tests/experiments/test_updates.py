"""The runs of the study of updates do what their names say."""

from __future__ import annotations

import pytest

from trl_diffusion.experiments import updates
from trl_diffusion.experiments.updates import COLLECT, GROUP, PAIRS, Job, Updates


@pytest.fixture
def study(monkeypatch) -> Updates:
    monkeypatch.setattr(updates, "GENERATIONS", 4)
    return Updates(seeds=(0,), updates=2, batch_size=8, prompts=4, epochs=1, eval_size=4, measurements=1)


def test_a_run_of_each_kind(study, tmp_path):
    """A collection is what the pairs are made of, and every run has its curve, from before it to its end, and its signs."""
    row, said = study.do(Job(COLLECT, 0), tmp_path)
    assert row == {"responses": 16} and said == "16 responses"
    group = (("learning_rate", 6e-4), ("beta", 0.1), ("num_iterations", 1), ("num_draws", 1))
    pairs = (("learning_rate", 6e-4), ("beta", 0.5), ("num_draws", 1), ("sft_weight", 1.0))
    jobs = Job(GROUP, 0, group), Job(PAIRS, 0, pairs)
    assert study.needs(jobs[1]) == [Job(COLLECT, 0)] and not study.needs(jobs[0])
    online, offline = (study.do(job, tmp_path)[0] for job in jobs)
    assert [step for step, _ in online["curve"]] == [0, 2]
    assert offline["curve"][0][0] == 0 and len(offline["curve"]) == 2 and offline["curve"][1][0] >= 1
    assert len(online["signs"]["kl"]) == 2 and not any(key.startswith("rewards/") for key in online["signs"])
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies"} <= set(offline["signs"])
    for row in (online, offline):
        assert row["diverged"] is None and row["puzzles"] == 4 and all(0 <= solved <= 1 for _, solved in row["curve"])


def test_a_policy_that_breaks_is_a_result(study, tmp_path):
    """With a learning rate beyond all measure the run ends as a row, of a policy that solves nothing."""
    setting = (("learning_rate", 1e30), ("beta", 0.0), ("num_iterations", 1), ("num_draws", 1))
    row, said = study.do(Job(GROUP, 0, setting), tmp_path)
    assert row["curve"][-1][1] == 0.0 and said.endswith("-> 0.0%")
