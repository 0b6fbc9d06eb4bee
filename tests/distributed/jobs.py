"""
What the processes of a distributed test run: a trainer for each cell, one after another, with what it did left on disk.

A cell is a mapping: `name`; `rows`, responses in the global batch, whatever the number of processes; `options` of
`DTRPOConfig`, or of `DiffusionSFTConfig` for a cell that is `supervised`; and optionally `lora` (`True`, or options of `LoraConfig`), `trajectories`, `model`, `tokenizer`, `resume`, a
checkpoint, and `disturb`, whether a decoding fails after the first step.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback

from trl_diffusion import (
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    DTRPOConfig,
    DTRPOTrainer,
    load_trajectories,
    tiny_policy_path,
)
from trl_diffusion.rewards import sudoku


class Recorder:
    """A reward that differs between most answers (share of cells that hold a digit of a random key), and remembers the
    tokens it was shown."""

    __name__ = "share"

    def __init__(self):
        self.seen: list[list[list[int]]] = []

    def __call__(self, completions, completion_ids, solution, **kwargs) -> list[float]:
        self.seen.append([list(ids) for ids in completion_ids])
        return [sum(map(str.__eq__, text, right)) / 16 for text, right in zip(completions, solution, strict=True)]


def prompts(size: int = 16) -> Dataset:
    """Prompts of unequal lengths, so that responses take unequal numbers of blocks."""
    rows = sudoku.generate(size, seed=3)
    return Dataset.from_list([{"prompt": sudoku.prompt(r["puzzle"])[: 10 + i % 7], **r} for i, r in enumerate(rows)])


def solutions() -> Dataset:
    """Prompts of unequal lengths with their solutions."""
    return Dataset.from_list([{"prompt": row["prompt"], "completion": row["solution"]} for row in prompts()])


def make_trainer(cell: dict[str, Any], directory: Path, reward=None, **changes) -> DTRPOTrainer | DiffusionSFTTrainer:
    """The trainer of a cell, on as many processes as there are."""
    AcceleratorState._reset_state()  # the process group stays
    GradientState._reset_state()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"  # is told by DS_ACCELERATOR to use the CPU
    backend = "gloo" if "LOCAL_RANK" in os.environ else None
    processes = PartialState(cpu=not deepspeed, backend=backend).num_processes
    rows, rest = divmod(cell["rows"], processes)
    assert not rest, f"{cell['rows']} rows do not divide among {processes} processes"
    offline = cell.get("trajectories")
    model = cell.get("model") or tiny_policy_path()
    lora = cell.get("lora") or None
    if lora is not None:
        options = {"target_modules": "all-linear", "init_lora_weights": "gaussian"} if lora is True else lora
        lora = LoraConfig(r=4, **options)
    torch.manual_seed(0)  # what an adapter starts from
    options = {
        "output_dir": str(directory),
        "per_device_train_batch_size": rows,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-5,  # with a smaller one, rounding errors of a gradient that is 0 take whole steps
        "max_steps": 2,
        "use_cpu": not deepspeed,
        "ddp_backend": backend,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        **(
            {} if cell.get("supervised") else {"num_generations": 4, "max_completion_length": 20, "tokens_per_step": 2}
        ),
        **cell.get("options", {}),
        **changes,
    }
    tokenizer = AutoTokenizer.from_pretrained(cell.get("tokenizer") or model, padding_side="left")
    if cell.get("supervised"):
        return DiffusionSFTTrainer(
            model,
            DiffusionSFTConfig(**options),
            solutions(),
            solutions().select(range(5)),
            processing_class=tokenizer,
            peft_config=lora,
        )
    return DTRPOTrainer(
        model=model,
        reward_funcs=None if offline else reward or Recorder(),
        args=DTRPOConfig(**options),
        train_dataset=load_trajectories(offline) if offline else prompts(),
        processing_class=tokenizer,
        peft_config=lora,
    )


def shares(trainer: DTRPOTrainer) -> dict[str, tuple[int, int, int]]:
    """Under ZeRO-3, for policy and reference: number of weights, how many of them this process holds, and how many it
    has gathered at the moment."""
    found = {}
    for name, model in (("policy", trainer.model), ("reference", getattr(trainer, "ref_model", None))):
        parameters = [] if model is None else [p for p in model.parameters() if hasattr(p, "ds_tensor")]
        if parameters:
            found[name] = tuple(
                sum(count(p) for p in parameters)
                for count in (lambda p: p.ds_numel, lambda p: p.ds_tensor.numel(), lambda p: p.numel())
            )
    return found


class DisturbingCallback(TrainerCallback):
    """Lets the policy fail in the middle of an answer, on every process, after the first step."""

    def __init__(self, trainer: DTRPOTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        def fail(*_):
            raise MemoryError("in the middle of an answer")

        if state.global_step == 1:
            handle = self.trainer.model.get_output_embeddings().register_forward_hook(fail)
            try:
                self.trainer.answer(self.trainer.train_dataset["prompt"][:4])
            except MemoryError:
                handle.remove()
            else:
                raise AssertionError("nothing failed")


def watch_passes(trainer: DTRPOTrainer) -> dict[str, int]:
    """Counts passes of the policy in rollouts, those with more than the one token of a pass for the sake of others, and
    the most weights that were gathered in the middle of one."""
    found = {"passes": 0, "needed": 0, "gathered": 0}

    def before(module, args, kwargs):
        if not torch.is_grad_enabled():
            found["passes"] += 1
            found["needed"] += kwargs["input_ids"].numel() > 1

    def inside(*_):
        if not torch.is_grad_enabled():
            found["gathered"] = max(found["gathered"], sum(p.numel() for p in trainer.model.parameters()))

    trainer.model.register_forward_pre_hook(before, with_kwargs=True)
    for layer in trainer.model.base_model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(inside)
    return found


def run(cell: dict[str, Any], directory: Path) -> None:
    """Trains one cell and leaves `model/`, `logs.json` and, for each process, `rollouts_RANK.json` and `shares_RANK.json`
    in `directory`."""
    torch.set_num_threads(1)
    directory.mkdir(parents=True, exist_ok=True)
    recorder = Recorder()
    trainer = make_trainer(cell, directory, recorder)
    if cell.get("disturb"):
        trainer.add_callback(DisturbingCallback(trainer))
    passes = watch_passes(trainer)
    trainer.train(resume_from_checkpoint=cell.get("resume"))
    before_saving = shares(trainer)
    trainer.save_model(str(directory / "model"))
    rank = trainer.accelerator.process_index
    (directory / f"rollouts_{rank}.json").write_text(json.dumps(recorder.seen))
    (directory / f"shares_{rank}.json").write_text(json.dumps(before_saving))
    (directory / f"passes_{rank}.json").write_text(json.dumps(passes))
    if rank == 0:
        (directory / "logs.json").write_text(json.dumps(trainer.state.log_history))
    trainer.accelerator.wait_for_everyone()
