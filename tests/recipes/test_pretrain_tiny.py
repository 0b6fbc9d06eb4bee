"""`recipes/pretrain_tiny.py`: what the embedded policies were trained on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from trl_diffusion import get_spec
from trl_diffusion.policies.loading import load_config
from trl_diffusion.rewards import sudoku
from trl_diffusion.scoring.layout import pack


PATH = Path(__file__).resolve().parents[2] / "recipes" / "pretrain_tiny.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("pretrain_tiny", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("policy", ["block", "full", "revising"])
def test_every_policy_can_be_made(recipe, tmp_path, monkeypatch, policy):
    options = ["--policy", policy, "--steps", "1", "--batch_size", "4", "--corpus_size", "40", "--hidden_size", "16"]
    monkeypatch.setattr(
        sys, "argv", ["pretrain_tiny.py", "--output_dir", str(tmp_path), *options, "--num_layers", "1"]
    )
    monkeypatch.setattr(recipe, "checks", lambda policy: {})
    random_state = torch.get_rng_state()
    try:
        recipe.main()
    finally:
        torch.set_rng_state(random_state)
    spec = get_spec(load_config(str(tmp_path)))
    assert (spec.attention, spec.predicts_visible_tokens) == (
        "block" if policy == "block" else "full",
        policy == "revising",
    )


def test_solutions_have_two_clues_and_no_puzzle_that_is_kept(recipe):
    for prompt, answer in recipe.make_solutions(300, seed=1):
        puzzle = prompt.removeprefix("sudoku ")
        assert puzzle.count("0") == 14 and puzzle not in sudoku.evaluation_puzzles(14)
        assert sudoku.is_solved(puzzle, answer)


def test_a_revising_policy_is_shown_wrong_tokens_and_predicts_all(recipe):
    tokenizer = recipe.build_tokenizer()
    pairs = recipe.make_solutions(400, seed=2)
    shares = {}
    for policy in ("full", "revising"):
        spec = recipe.build_spec(tokenizer, policy)
        batch, states = recipe.collate(pairs, tokenizer, spec, torch.Generator().manual_seed(0))
        layout = pack(batch, spec, states)
        inputs, places = layout.input_ids[layout.rows, layout.columns], (layout.responses, layout.event_columns)
        assert torch.equal(layout.targets, batch.canvas_ids[places])
        shares[policy] = [(inputs == spec.mask_token_id).float().mean().item(),
                          ((inputs != layout.targets) & (inputs != spec.mask_token_id)).float().mean().item()]  # fmt: skip
        every = batch.canvas_ids.numel()
        assert len(places[0]) == every if policy == "revising" else len(places[0]) < every
    assert shares["full"] == [1.0, 0.0]  # masked positions alone are scored, and nothing is shown wrong
    masked, wrong = shares["revising"]
    # Half of the positions are masked. Of the others, 5 % are replaced; a quarter of the new tokens are the same by chance.
    assert masked == pytest.approx(0.5, rel=0.1) and wrong == pytest.approx(0.5 * 0.05 * 0.75, rel=0.4)
