"""Pretraining of the twins: the same backbone, weights to begin with, documents, and order of documents for all of them."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import SFTConfig, SFTTrainer

from ..policies.loading import load_tokenizer
from ..policies.small import random_model, small_config
from ..policies.tiny import tiny_policy_path
from ..seeds import derive_seed
from ..sft.config import DiffusionSFTConfig
from ..sft.documents import IGNORED
from ..sft.trainer import DiffusionSFTTrainer
from ..tasks import Task, load_task
from .arms import TWINS
from .settings import Sizes


@dataclass
class Material:
    """
    The rows of a task, divided for one seed. No row is in two parts.

    Args:
        task (`str`): its name.
        seed (`int`): seed of the generator of rows.
        sizes ([`Sizes`]): how many rows each part has.
    """

    task: str
    seed: int
    sizes: Sizes

    @cached_property
    def whole(self) -> Task:
        """The task, with the rows of all parts as training rows."""
        sizes = self.sizes
        prompts = sizes.updates * sizes.batch_size // sizes.num_generations
        number = sizes.corpus_size + sizes.validation_size + prompts
        task = load_task(self.task, train_size=number, eval_size=sizes.eval_size, seed=self.seed)
        if len(task.train) <= sizes.corpus_size + sizes.validation_size:
            raise ValueError(
                f"The task {self.task!r} has {len(task.train)} training rows, and {sizes.corpus_size} to pretrain on and "
                f"{sizes.validation_size} to choose with leave none for reinforcement. Set a smaller `corpus_size`."
            )
        return task_in_text(task)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of all twins, with a token for each character."""
        return load_tokenizer(tiny_policy_path())

    @property
    def corpus(self) -> Dataset:
        """Rows to pretrain on."""
        return self.whole.train.select(range(self.sizes.corpus_size))

    @property
    def validation(self) -> Dataset:
        """Rows to choose with."""
        first = self.sizes.corpus_size
        return self.whole.train.select(range(first, first + self.sizes.validation_size))

    @property
    def prompts(self) -> Dataset:
        """Rows for reinforcement."""
        return self.whole.train.select(
            range(self.sizes.corpus_size + self.sizes.validation_size, len(self.whole.train))
        )

    @cached_property
    def documents(self) -> Dataset:
        """The corpus as tokens. Of a document, the answer and its stop token are trained."""
        pairs = self.whole.documents(self.corpus)
        prompts = self.tokenizer(list(pairs["prompt"]))["input_ids"]
        stop = self.tokenizer.eos_token
        answers = self.tokenizer([f"{answer}{stop}" for answer in pairs["completion"]])["input_ids"]
        both = list(zip(prompts, answers, strict=True))
        for number, (prompt, answer) in enumerate(both):
            if self.tokenizer.unk_token_id in (*prompt, *answer):
                raise ValueError(
                    f"The tokenizer of the twins lacks a character of row {number} of the task {self.task!r}: "
                    f"{pairs['prompt'][number]!r:.80}, {pairs['completion'][number]!r:.80}."
                )
        return Dataset.from_dict(
            {
                "input_ids": [prompt + answer for prompt, answer in both],
                "labels": [len(prompt) * [IGNORED] + answer for prompt, answer in both],
            }
        )

    @cached_property
    def length(self) -> int:
        """Tokens of the longest answer of the corpus, with its stop token."""
        return max(sum(label != IGNORED for label in labels) for labels in self.documents["labels"])

    def stream(self, updates: int) -> Dataset:
        """The documents of so many updates, in the order in which every twin reads them: epochs, each in an order of its own."""
        number, size = updates * self.sizes.pretrain_batch_size, len(self.documents)
        order: list[int] = []
        for epoch in range(-(-number // size)):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
            order += torch.randperm(size, generator=generator).tolist()
        return self.documents.select(order[:number])


def task_in_text(task: Task) -> Task:
    """The task with the text of the user's message as the prompt, where a prompt is one message: the twins have no chat template."""

    def in_text(row: dict[str, Any]) -> dict[str, Any]:
        prompt = row["prompt"]
        single = isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0]["content"], str)
        return {"prompt": prompt[0]["content"]} if single else {}

    if isinstance(task.train[0]["prompt"], str):
        return task
    return replace(task, train=task.train.map(in_text), evaluation=task.evaluation.map(in_text))


def build_trainer(material: Material, twin: str, updates: int, directory: str | Path) -> SFTTrainer:
    """
    The trainer that pretrains a twin.

    Args:
        material ([`Material`]): rows.
        twin (`str`): one of `TWINS`.
        updates (`int`): optimizer steps.
        directory (`str` or `Path`): where the trainer may write.
    """
    sizes, kind, tokenizer = material.sizes, TWINS[twin], material.tokenizer
    config = small_config(tokenizer, sizes.hidden_size, sizes.num_layers, kind.spec(tokenizer, material.length))
    options: dict[str, Any] = dict(
        output_dir=str(directory), per_device_train_batch_size=sizes.pretrain_batch_size, max_length=None, max_steps=updates,
        learning_rate=sizes.pretrain_learning_rate, lr_scheduler_type="cosine", warmup_steps=updates // 10, weight_decay=0.01,
        seed=material.seed, bf16=False, gradient_checkpointing=False, train_sampling_strategy="sequential", logging_steps=updates,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    arguments = {
        "model": random_model(config, material.seed),
        "train_dataset": material.stream(updates),
        "processing_class": tokenizer,
    }
    if kind.attention is None:
        trainer = SFTTrainer(args=SFTConfig(**options, dataloader_pin_memory=False), **arguments)
    else:
        # Two masks of a document: with one, small twins learn far more slowly. With the weights of the ELBO, and with a learning rate
        # twice as high, some seeds do not learn the task at all.
        masks: dict[str, Any] = {"num_masks": 2, "weighting": "mean", "max_corruption": kind.corruption}
        if kind.attention == "full":
            masks["canvas_length"] = material.length
        trainer = DiffusionSFTTrainer(args=DiffusionSFTConfig(**options, **masks), **arguments)
    trainer.remove_callback(PrinterCallback)
    return trainer


def flops_of_update(trainer: SFTTrainer) -> int:
    """
    Floating-point operations of one update, forward and backward, on its first batch: those of the matrix products, as PyTorch
    counts them while they run. Attention is computed in parts that PyTorch can count.
    """
    model = cast(PreTrainedModel, trainer.model)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        trainer.compute_loss(model, batch).backward()
    model.zero_grad()
    return counter.get_total_flops()


def updates_of(material: Material, twin: str) -> int:
    """Optimizer steps with which a twin is pretrained (see `Sizes.equal` and `Sizes.longer`)."""
    updates = material.sizes.pretrain_updates * (2 if material.task in material.sizes.longer else 1)
    if material.sizes.equal == "tokens" or twin == "autoregressive":
        return updates
    with tempfile.TemporaryDirectory() as directory:
        costs = [flops_of_update(build_trainer(material, name, 1, directory)) for name in ("autoregressive", twin)]
    return max(round(updates * costs[0] / costs[1]), 1)


def pretrain(material: Material, twin: str, directory: Path) -> dict[str, Any]:
    """
    Pretrains a twin, and saves it with its tokenizer.

    Args:
        material ([`Material`]): rows.
        twin (`str`): one of `TWINS`.
        directory (`Path`): where to save it.

    Returns:
        `dict`: parameters, updates, documents, tokens, floating-point operations and core seconds.
    """
    updates = updates_of(material, twin)
    with tempfile.TemporaryDirectory() as scratch:
        flops = flops_of_update(build_trainer(material, twin, 1, scratch))
        trainer = build_trainer(material, twin, updates, scratch)
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
    stream = material.stream(updates)
    model = cast(PreTrainedModel, trainer.model)
    model.eval().save_pretrained(directory)
    material.tokenizer.save_pretrained(directory)
    log = trainer.state.log_history
    return {
        "parameters": model.num_parameters(),
        "updates": updates,
        "documents": len(stream),
        "tokens": sum(map(len, stream["input_ids"])),
        "answer_tokens": sum(label != IGNORED for labels in stream["labels"] for label in labels),
        "flops": flops * updates,
        "seconds": round(seconds, 1),
        "loss": next(entry["loss"] for entry in reversed(log) if "loss" in entry),
    }
