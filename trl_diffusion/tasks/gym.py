"""The generators of reasoning-gym, as tasks."""

from __future__ import annotations

import os
import random
import sys
import time
import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from importlib import import_module
from itertools import islice
from pkgutil import walk_packages
from types import ModuleType
from typing import Any

import numpy as np
from datasets import Dataset

from ..fields import nearest
from ..rewards.gym import GymReward, GymScorer, generators
from ..seeds import derive_seed
from ..utils import read_mapping
from .task import Task


PREFIX = "reasoning_gym:"
_SPELLING = f"{PREFIX}NAME+OPTION:VALUE+OPTION:VALUE"
_KEPT = 2**31  # the seed of the first evaluation question; those of training are below
_MOST_KEPT = 500  # questions that are kept for evaluation
_FEWEST = 16  # training questions
_OWN = ("seed", "size")  # options that are set here
# Generators that go through sets of texts: their questions depend on how texts are hashed, which each process does in its own way.
_UNSTEADY = ("isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder")
_SLOW = 60.0  # seconds of making questions after which something is said


def make_gym_task(
    text: str, train_file: str | None, eval_file: str | None, train_size: int, eval_size: int, seed: int
) -> Task:
    """
    The questions of a generator, and its verifier. Each question has a seed of its own. The same 500 questions are always kept for
    evaluation, however many of them are asked; of a generator of fewer, half of those that it makes. Training questions have other seeds. One
    that is an evaluation question nevertheless is dropped.

    Args:
        text (`str`): `"reasoning_gym:NAME"`, perhaps with options, as `+name:value`.
        train_file, eval_file (`str`, *optional*): not for these tasks.
        train_size, eval_size (`int`): most questions.
        seed (`int`): seed of the training questions.

    Raises:
        ImportError: if reasoning-gym is not installed.
        ValueError: for an unknown name, an unknown option, a value that the generator does not take, or too few questions.
    """
    for option, file in (("train_file", train_file), ("eval_file", eval_file)):
        if file:
            raise ValueError(f"`{text}` makes its own questions: leave `--{option}` out.")
    name, options = parse_gym_name(text)
    if name in _UNSTEADY and not os.environ.get("PYTHONHASHSEED", "random").isdecimal():
        raise ValueError(
            f"{text} makes other questions in each process, unless texts are hashed in the same way: set the environment variable "
            "PYTHONHASHSEED to 0."
        )
    maker = _Maker(text, name, options)
    kept = maker.make(_MOST_KEPT, _KEPT, set())
    if not kept:
        raise ValueError(f"{text} makes no question. Give it other options.")
    if len(kept) < _MOST_KEPT:
        kept = _first(kept, max(1, len(kept) // 2))
    train = maker.make(train_size, derive_seed(seed, 0) % 2**30, kept)
    if len(train) < min(train_size, _FEWEST):
        raise ValueError(
            f"{text} makes too few different questions: {len(kept)} are kept for evaluation, and {len(train)} are left to train on. "
            "Give it other options."
        )
    evaluation = _first(kept, eval_size)
    scorer, entries = GymScorer(name, options), {**evaluation, **train}
    reward, solved = GymReward(scorer, entries), GymReward(scorer, entries, whole=True)

    def solution(row: dict[str, Any]) -> str | None:
        return entries[row["question"]]["answer"]

    return Task(text, "questions", _rows(train), _rows(evaluation), [reward], solved, solution)


def _first(entries: dict[str, dict[str, Any]], number: int) -> dict[str, dict[str, Any]]:
    return dict(islice(entries.items(), number))


def _rows(entries: dict[str, dict[str, Any]]) -> Dataset:
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": question}], "question": question} for question in entries]
    )


def parse_gym_name(text: str) -> tuple[str, dict[str, Any]]:
    """
    The name of a generator and its options.

    Raises:
        ImportError: if reasoning-gym is not installed.
        ValueError: if there is no such generator, or it has no such option.
    """
    name, plus, given = text.removeprefix(PREFIX).partition("+")
    known = generators()
    if name not in known:
        near = [one for one in known if name and name in one][:3] or nearest(name, known) if name else []
        hint = f" Is it meant to be {' or '.join(near)}?" if near else f" There are {', '.join(sorted(known))}."
        raise ValueError(f"reasoning-gym has no generator {name!r}. Write {_SPELLING}.{hint}")
    if plus and not given.strip():
        raise ValueError(f"{text}: there is no option after the last `+`. Write {_SPELLING}.")
    options = read_mapping(given, text) if plus else {}
    defaults = {
        one.name: one.default_factory() if one.default_factory is not MISSING else one.default
        for one in fields(known[name][1])
        if one.name not in _OWN
    }
    for option in options:
        if option in _OWN:
            raise ValueError(
                f"{text}: `{option}` follows from `--seed`, `--train_size` and `--eval_size`. Leave it out."
            )
        if option not in defaults:
            near = nearest(str(option), defaults)
            hint = f" Is it meant to be {' or '.join(near)}?" if near else ""
            raise ValueError(f"{text}: {name} has no option {option!r}; it has {sorted(defaults)}.{hint}")
    return name, {option: _as(defaults[option], value, f"{text}: `{option}`") for option, value in options.items()}


def _as(default: Any, value: Any, what: str) -> Any:
    """A value of the kind that an option has by default."""
    kinds: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
    for kind, allowed in kinds.items():
        if type(default) is kind and type(value) not in allowed:
            raise ValueError(f"{what} must be of type {kind.__name__}, as {default!r} is, got {value!r}.")
    if isinstance(default, list | tuple) and not isinstance(value, list):
        raise ValueError(
            f'{what} must be a list, as {list(default)} is, got {value!r}. Write JSON: NAME+{{"OPTION": [..]}}.'
        )
    return type(default)(value) if isinstance(default, tuple) else value


class _OwnRandom(random.Random):
    """Stands for the module `random` with a state of its own."""

    Random = random.Random


def _users(generator: type) -> list[ModuleType]:
    """The modules that may make questions of this class and that call functions of the module `random`."""
    package = import_module(generator.__module__.rpartition(".")[0])
    for module in walk_packages(
        package.__path__, f"{package.__name__}."
    ):  # some are not imported before they are needed
        with suppress(ImportError):  # a few are parts of scripts
            import_module(module.name)
    own = (module for name, module in sys.modules.items() if name.startswith("reasoning_gym."))
    return [module for module in own if vars(module).get("random") is random]


@contextmanager
def _seeded(modules: list[ModuleType], seed: int) -> Iterator[None]:
    """
    Inside, the module `random` of these modules is one with a seed, since a few generators call its functions. The state of NumPy, which one of
    them seeds, is afterwards what it was.
    """
    own, numpy_state = _OwnRandom(seed), np.random.get_state()
    try:
        for module in modules:
            vars(module)["random"] = own
        yield
    finally:
        np.random.set_state(numpy_state)
        for module in modules:
            vars(module)["random"] = random


class _Maker:
    """Makes the questions of a generator, and says so if that takes long."""

    def __init__(self, text: str, name: str, options: dict[str, Any]):
        self.text, self.name, self.options = text, name, options
        self.begun, self.is_told = time.monotonic(), False

    def make(self, number: int, seed: int, kept: Container[str]) -> dict[str, dict[str, Any]]:
        """
        Different questions, by their text.

        Args:
            number (`int`): most questions. There are fewer if twice as many seeds do not give that many.
            seed (`int`): seed of the first of them; others follow.
            kept (`Container[str]`): questions that must not come up.
        """
        found: dict[str, dict[str, Any]] = {}
        for entry in self._entries(2 * number + 100, seed, number):
            if entry["question"] not in kept:
                found.setdefault(entry["question"], entry)
            self._tell(len(found), number)
            if len(found) == number:
                break
        return found

    def _entries(self, most: int, seed: int, size: int) -> Iterator[dict[str, Any]]:
        from reasoning_gym import create_dataset

        users = _users(generators()[self.name][0])
        for first in range(0, most, size):
            try:
                with _seeded(users, seed + first):
                    dataset = create_dataset(self.name, seed=seed + first, size=size, **self.options)
                for number in range(min(size, most - first)):
                    with _seeded(users, seed + first + number):
                        entry = dict(dataset[number])
                    if not isinstance(entry.get("question"), str) or not entry["question"].strip():
                        raise ValueError(f"question {number} is no text")
                    yield entry
            except Exception as error:  # of its own checks, or because there is no such question
                raise ValueError(f"{self.text}: {type(error).__name__}: {str(error) or 'no message'}") from error

    def _tell(self, done: int, number: int) -> None:
        seconds = time.monotonic() - self.begun
        if not self.is_told and seconds > _SLOW:
            self.is_told = True
            warnings.warn(
                f"{self.text} has made {done} of {number} questions in {seconds:.0f} seconds. `--train_size` says how many are "
                f"made, beside the {_MOST_KEPT} that are kept for evaluation."
            )
