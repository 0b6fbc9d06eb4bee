"""The embedded policies."""

from __future__ import annotations

import pytest

from trl_diffusion import DecodingConfig, decode, tiny_policy_path
from trl_diffusion.policies.policy import open_policy
from trl_diffusion.rewards import sudoku
from trl_diffusion.tasks import load_task


def test_names():
    assert tiny_policy_path() == tiny_policy_path("block") != tiny_policy_path("full")
    with pytest.raises(ValueError, match=r"`name` must be one of \['block', 'full', 'revising'\], got 'large'"):
        open_policy("embedded:large")


@pytest.mark.parametrize(("name", "low"), [("full", 0.4), ("revising", 0.75)])
def test_policies_with_full_attention_solve_sudokus_with_two_clues(name, low):
    policy = open_policy(f"embedded:{name}")
    assert (policy.spec.attention, policy.spec.block_size) == ("full", 17)
    assert policy.spec.predicts_visible_tokens == (name == "revising")
    puzzles = list(sudoku.evaluation_puzzles(14))[:100]
    prompts = policy.tokenizer([sudoku.prompt(puzzle) for puzzle in puzzles])["input_ids"]
    settings = {"revision": "confidence"} if name == "revising" else {}
    batch = decode(policy.model, prompts, DecodingConfig(17, steps_per_block=8, **settings), policy.spec)
    answers = policy.tokenizer.batch_decode(batch.completions(), skip_special_tokens=True)
    assert sum(sudoku.sudoku_solved(answers, puzzles)) / 100 > low
    assert (batch.revisions is not None) == (name == "revising")


def test_sudokus_with_two_clues():
    task = load_task("sparse_sudoku", train_size=5000, eval_size=500, seed=3)
    train, kept = set(task.train["puzzle"]), set(task.evaluation["puzzle"])
    assert len(train) == 1000 and len(kept) == 500 and not train & kept
    assert all(puzzle.count("0") == 14 for puzzle in train | kept)
    assert kept == set(sudoku.evaluation_puzzles(14))
