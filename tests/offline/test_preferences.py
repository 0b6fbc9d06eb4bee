"""Preference data: the replay is kept, and GSM8K's pairs in all of TRL's formats."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import make_policy, shared
from trl_diffusion import DiffusionSpec, from_preferences
from trl_diffusion.rewards.math import final_answer
from trl_diffusion.tasks.gsm8k import gsm8k_row


RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PAIRS = [{"prompt": f"sudoku {i}", "chosen": "12" * (i + 1), "rejected": "345"} for i in range(5)]


@pytest.fixture
def replay(start, tokenizer, char_spec, tmp_path, monkeypatch):
    """Replays with an empty cache; returns the dataset and the number of forward passes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))

    def run(rows=PAIRS, model=None, **options):
        model = AutoModelForCausalLM.from_pretrained(start) if model is None else model
        calls = []
        model.register_forward_pre_hook(lambda *args: calls.append(1))
        options = {"tokens_per_step": 2, "batch_size": 4, **options}
        made = from_preferences(Dataset.from_list(rows), tokenizer, char_spec, "confidence", model=model, **options)
        return made.to_list(), len(calls)

    return run


def test_the_same_replay_is_not_made_twice(replay, tmp_path):
    first, passes = replay()
    assert passes > 0 and len(list(tmp_path.glob("trl_diffusion/*"))) == 1
    assert replay() == (first, 0)
    other_columns, passes = replay([{**row, "source": "me"} for row in PAIRS])
    assert passes == 0 and other_columns[0]["source"] == "me"


@pytest.mark.parametrize(
    "change",
    [
        {"tokens_per_step": 1},
        {"temperature": 0.5},
        {"rows": [*PAIRS[:4], {**PAIRS[4], "rejected": "346"}]},
        {"rows": [*PAIRS[:4], {**PAIRS[4], "prompt": "sudoku 9"}]},
        {"rows": PAIRS[:4]},
    ],
)
def test_whatever_changes_the_replay_is_noticed(replay, change, monkeypatch):
    replay()
    changed, passes = replay(**change)
    assert passes > 0
    monkeypatch.setattr("trl_diffusion.offline.replay.is_caching_enabled", lambda: False)
    assert changed == replay(**change)[0]


def test_another_policy_is_noticed(replay, tokenizer, char_spec):
    first, _ = replay()
    other = make_policy(char_spec, seed=3, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    found, passes = replay(model=other)
    assert passes > 0 and found[0]["event_logps"] != first[0]["event_logps"]


def test_a_damaged_cache_is_made_anew(replay, tmp_path, monkeypatch):
    first, passes = replay()
    (file,) = tmp_path.glob("trl_diffusion/*")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert replay() == (first, passes)
    assert file.read_bytes() == whole and list(tmp_path.glob("trl_diffusion/*")) == [file]
    file.unlink()
    monkeypatch.setattr("trl_diffusion.offline.replay.is_caching_enabled", lambda: False)
    assert replay() == (first, passes) and not file.exists()


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("gsm8k_preferences", RECIPES / "gsm8k_preferences.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def solutions(size: int) -> list[dict]:
    with shared("data", "gsm8k", "train.jsonl").open() as file:
        return [json.loads(line) for _, line in zip(range(size), file, strict=False)]


def test_corrupted_solutions_are_wrong(recipe):
    rows, rng = solutions(500), random.Random(1)
    corrupted = [recipe.corrupt(row["answer"], rng) for row in rows]
    for row, text in zip(rows, corrupted, strict=True):
        right, wrong = (int(final_answer(solution).replace(",", "")) for solution in (row["answer"], text))
        assert right != wrong
        # Nothing but numbers has changed.
        assert re.sub(r"-?[\d.,]+", "", text) == re.sub(r"-?[\d.,]+", "", row["answer"])


@pytest.mark.slow
def test_gsm8k_pairs_in_every_format(recipe):
    """The real tokenizer reads the same pair from text or messages, with the prompt apart or not."""
    tokenizer = AutoTokenizer.from_pretrained(shared("fixtures", "fast_dllm_v2", "tokenizer"), padding_side="left")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    spec = DiffusionSpec(
        mask_token_id=tokenizer.convert_tokens_to_ids("|<MASK>|"), block_size=32, token_shift=True,
        first_token="autoregressive", stop_token_ids=(stop,),
    )  # fmt: skip
    texts = {}
    for plain in (False, True):
        for implicit in (False, True):
            rng = random.Random(0)
            pairs = [
                recipe.make_pair(gsm8k_row(row)["prompt"], row["answer"], rng, plain, implicit)
                for row in solutions(20)
            ]
            made = from_preferences(Dataset.from_list(pairs), tokenizer, spec, tokens_per_step=4)
            texts[plain, implicit] = [
                tuple(tokenizer.decode(row["prompt_ids"] + tokens_of(row, index)) for index in range(2))
                for row in made
            ]
            assert all(tokens_of(row, index)[-1] == stop for row in made for index in range(2))
            assert all(tokens_of(row, 0) != tokens_of(row, 1) for row in made)
    assert texts[False, False] == texts[False, True] and texts[True, False] == texts[True, True]
    for row, chatty, plain in zip(solutions(20), texts[False, False], texts[True, False], strict=True):
        solution = re.sub("<<.*?>>", "", row["answer"])
        assert chatty[0].endswith(f"<|im_start|>assistant\n{solution}<|im_end|>")
        assert plain[0].startswith(row["question"]) and plain[0].endswith(f"answer.\n{solution}<|im_end|>")
        assert chatty[1].split("<|im_start|>assistant\n")[1] == plain[1].split("answer.\n")[-1]


def tokens_of(row: dict, index: int) -> list[int]:
    events = sorted(zip(row["event_positions"][index], row["event_tokens"][index], strict=True))
    return [token for _, token in events]


def test_what_was_not_recorded_is_not_compared(tmp_path, start, tokenizer):
    """Without a recording there is no gap to it, and no ratio."""
    from trl_diffusion import DTRPOConfig, DTRPOTrainer

    trainer = DTRPOTrainer(
        str(start),
        args=DTRPOConfig(
            str(tmp_path), loss_type="dpo", beta=0.1, num_generations=2, per_device_train_batch_size=4, max_steps=1,
            logging_steps=1, max_completion_length=14, bf16=False, report_to="none", save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    logged = trainer.state.log_history[0]
    assert "rewards/margins" in logged and "diffusion/scored_tokens" in logged
    assert not {"diffusion/recorded_gap/max", "diffusion/log_ratio_std"} & set(logged)
    assert torch.isfinite(torch.tensor(logged["loss"]))
