"""
What tests run in processes of their own, to be killed or in pairs. The fork server of [`tests.processes`] imports this module; what
a job would import later is imported here, so that a job starts, and can be killed, within a moment.
"""

from __future__ import annotations

import gc
import logging
import os
import time
import warnings
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tests.offline.conftest import length, prompt_dataset
from tests.trainer.conftest import codes, make_dataset
from trl_diffusion import DecodingConfig, DTRPOConfig, DTRPOTrainer, collect, load_trajectories


extract_model_from_parallel(torch.nn.Linear(1, 1))  # imports DeepSpeed where it is installed
gc.freeze()  # or every training looks for garbage among all that has been imported


def slow_codes(completions, **kwargs) -> list[float]:
    time.sleep(0.01)
    return codes(completions)


slow_codes.__name__ = "codes"


def quiet() -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # metrics


def nothing() -> None:
    """Starts the server."""


def collect_job(start: str, output_dir: str) -> None:
    quiet()
    collect(
        AutoModelForCausalLM.from_pretrained(start),
        AutoTokenizer.from_pretrained(start, padding_side="left"),
        prompt_dataset(20),
        slow_codes,
        output_dir,
        DecodingConfig(14, 1.0, tokens_per_step=2),
        num_responses=4,
        rows_per_shard=1,
        seed=5,
        disable_tqdm=True,
    )
    os._exit(0)


def train_job(start: str, trajectories: str, output_dir: str) -> None:
    quiet()
    # A plain table in memory: what is killed here is training, not the cache of another library.
    dataset = Dataset.from_list(load_trajectories(trajectories).to_list())
    trainer = DTRPOTrainer(
        model=start,
        args=DTRPOConfig(
            output_dir=output_dir, max_steps=12, save_steps=3, save_total_limit=2, learning_rate=1e-3, beta=0.1,
            per_device_train_batch_size=4, num_generations=4, num_iterations=2, max_completion_length=14,
            tokens_per_step=2, logging_steps=1, bf16=False, gradient_checkpointing=False, report_to="none",
            disable_tqdm=True, log_level="error",
        ),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(start, padding_side="left"),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    final = Path(output_dir) / "final"
    trainer.save_model(str(final))
    trainer.state.save_to_json(str(final / "state.json"))
    os._exit(0)


def pair_job(rank: int, start: str, directory: str) -> dict[str, dict]:
    """
    One of two processes that collect together, train together, and go on from a checkpoint together. Returns the losses of the run
    and of the one that went on, and whether both have the same weights, online and offline.
    """
    quiet()
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    run = Path(directory)
    collect(
        AutoModelForCausalLM.from_pretrained(start), tokenizer, prompt_dataset(), [codes, length], run / "collected",
        DecodingConfig(14, 1.0, tokens_per_step=2), num_responses=4, rows_per_shard=3, batch_size=8, seed=5,
        disable_tqdm=True,
    )  # fmt: skip
    results = {}
    for source in ("online", "offline"):
        online = source == "online"
        trainers = []
        for checkpoint in (None, run / source / "checkpoint-5"):
            trainer = DTRPOTrainer(
                start,
                reward_funcs=codes if online else None,
                args=DTRPOConfig(
                    str(run / source), max_steps=7, save_steps=5, learning_rate=1e-2, beta=0.05, num_iterations=2,
                    per_device_train_batch_size=4, num_generations=4, steps_per_generation=2, max_completion_length=14,
                    gradient_accumulation_steps=1, tokens_per_step=2, logging_steps=1, bf16=False, use_cpu=True,
                    gradient_checkpointing=False, report_to="none", disable_tqdm=True, log_level="error",
                ),
                train_dataset=make_dataset(8) if online else load_trajectories(run / "collected"),
                processing_class=tokenizer,
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            trainers.append(trainer)
        losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in trainers]
        weights = [list(t.model.parameters()) for t in trainers]
        results[source] = {
            "losses": losses,
            "same_weights": all(torch.equal(a, b) for a, b in zip(*weights, strict=True)),
        }
    return results
