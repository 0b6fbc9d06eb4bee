"""`recipes/pretrain_tiny.py`: what the embedded policies were trained on."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from trl_diffusion import get_spec
from trl_diffusion.policies.loading import load_config
from trl_diffusion.rewards import sudoku
from trl_diffusion.scoring.layout import pack
from trl_diffusion.sft.documents import Documents
from trl_diffusion.sft.masks import document_states


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


def options(**changed) -> argparse.Namespace:
    """Those of the command line, of a small policy."""
    small = {"steps": 1, "batch_size": 4, "corpus_size": 40, "hidden_size": 16, "num_layers": 1}
    return argparse.Namespace(**{"learning_rate": 1e-3, "carelessness": 0.5, "seed": 0, **small, **changed})


@pytest.mark.parametrize("policy", ["block", "full", "revising"])
def test_what_is_trained(recipe, tmp_path, policy):
    """The answer with its stop token, in whole blocks; and wrong visible tokens only for the policy that is to revise."""
    random_state = torch.get_rng_state()
    try:
        trainer = recipe.build_trainer(options(policy=policy, output_dir=str(tmp_path)))
    finally:
        torch.set_rng_state(random_state)
    corpus = recipe.make_corpus(40, 0.5, 0) if policy == "block" else recipe.make_solutions(40, 0)
    tokenizer, spec = trainer.processing_class, trainer.spec
    for (prompt, answer), row in zip(corpus, trainer.train_dataset, strict=True):
        trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == token]
        assert tokenizer.decode(row["input_ids"]) == f"{prompt}{answer}<eos>"
        assert tokenizer.decode(trained) == f"{answer}<eos>"
    assert (trainer.masks.weighting, trainer.masks.max_corruption) == ("mean", 0.1 if policy == "revising" else 0.0)
    documents = Documents(**trainer.data_collator([trainer.train_dataset[row] for row in range(40)]))
    states = [document_states(documents, spec, seed, trainer.masks) for seed in range(30)]
    shown = [layout_inputs(documents, spec, one) for one in states]
    masked, wrong = (sum(one[place] for one in shown) / len(shown) for place in (0, 1))
    if policy == "revising":
        # Half of the positions are masked. Of the others, 5 % are replaced; a quarter of the new tokens are the same by chance.
        assert masked == pytest.approx(0.5, rel=0.1) and wrong == pytest.approx(0.5 * 0.05 * 0.75, rel=0.4)
    else:
        assert (masked, wrong) == (1.0, 0.0)  # masked positions alone are scored, and nothing is shown wrong


def layout_inputs(documents: Documents, spec, states) -> tuple[float, float]:
    """Of the scored places, the shares that show a mask token, and another token than is to be predicted."""
    layout = pack(documents.trajectories(), spec, states)
    inputs = layout.input_ids[layout.rows, layout.columns]
    masked = inputs == spec.mask_token_id
    return masked.float().mean().item(), (~masked & (inputs != layout.targets)).float().mean().item()
