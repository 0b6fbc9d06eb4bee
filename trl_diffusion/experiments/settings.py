"""How much of everything a comparison has."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from ..fields import AtLeast, Within, check_fields, check_one_of


EQUAL = ("tokens", "flops")


@dataclass(frozen=True)
class Sizes:
    """
    How a policy is made, taught and measured. Two runs with equal sizes can be compared.

    Args:
        hidden_size, num_layers (`int`): width and layers of the backbone.
        corpus_size (`int`): different right answers to pretrain on.
        pretrain_updates, pretrain_batch_size (`int`): optimizer steps of pretraining, and answers in each.
        longer (`tuple[str, ...]`): tasks whose twins are pretrained twice as long. With fewer updates, seeds differ in whether
            they have learned the task at all.
        pretrain_learning_rate (`float`): highest learning rate of pretraining. It falls as a cosine.
        equal (`str`): what twins have in common: `"tokens"` (the answers that they were shown) or `"flops"` (floating-point
            operations; the autoregressive twin has `pretrain_updates`, the others fewer or more).
        updates, batch_size, num_generations (`int`): optimizer steps of reinforcement, answers in each, and answers to a prompt.
        num_draws (`int`): steps of an answer that an update scores, with full attention, where each is a forward pass. With block
            attention, one step of every block is in a single pass.
        seconds (`float`): core seconds of reinforcement for the budget of equal seconds.
        learning_rates (`tuple[float, ...]`): learning rates of reinforcement that every arm chooses from.
        eval_size, validation_size (`int`): puzzles that an arm is measured on, and puzzles with which thresholds and learning
            rates are chosen.
        num_samples (`int`): answers to a puzzle for pass@k.
        marks (`tuple[int, ...]`): further numbers of updates after which an arm is measured at the settings of its training.
        choice_seed (`int`): the seed with which learning rates are chosen. It plays no other part.

    Raises:
        ValueError: for a value out of range.
    """

    hidden_size: Annotated[int, AtLeast(8)] = 64
    num_layers: Annotated[int, AtLeast(1)] = 3
    corpus_size: Annotated[int, AtLeast(1)] = 12_000
    pretrain_updates: Annotated[int, AtLeast(1)] = 1000
    pretrain_batch_size: Annotated[int, AtLeast(1)] = 64
    longer: tuple[str, ...] = ("backward_chain", "chain")
    pretrain_learning_rate: Annotated[float, Within("(0, inf)")] = 1.5e-3
    equal: str = "tokens"
    updates: Annotated[int, AtLeast(1)] = 30
    batch_size: Annotated[int, AtLeast(2)] = 256
    num_generations: Annotated[int, AtLeast(2)] = 16
    num_draws: Annotated[int, AtLeast(1)] = 4
    seconds: Annotated[float, Within("(0, inf)")] = 15.0
    learning_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    eval_size: Annotated[int, AtLeast(1)] = 250
    validation_size: Annotated[int, AtLeast(1)] = 150
    num_samples: Annotated[int, AtLeast(1)] = 4
    marks: tuple[int, ...] = ()
    choice_seed: Annotated[int, AtLeast(0)] = 1000

    def __post_init__(self):
        own = {"learning_rates", "equal", "marks", "longer"}
        check_fields(self, set(self.__dataclass_fields__) - own)
        check_one_of("equal", self.equal, EQUAL)
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"`learning_rates` must be positive numbers, got {self.learning_rates!r}.")
        if self.batch_size % self.num_generations:
            raise ValueError(f"`batch_size` ({self.batch_size}) must be a multiple of `num_generations` "
                             f"({self.num_generations}).")  # fmt: skip
        if any(not 0 < mark < self.updates for mark in self.marks):
            raise ValueError(f"`marks` must be between 0 and `updates` ({self.updates}), got {list(self.marks)!r}.")
        if self.hidden_size % 8:
            raise ValueError(f"`hidden_size` must be a multiple of 8, got {self.hidden_size}.")

    def to_dict(self) -> dict[str, Any]:
        """The sizes as plain JSON types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
