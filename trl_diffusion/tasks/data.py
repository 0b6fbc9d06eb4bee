"""A task of somebody's own rows and reward functions, which a command line names."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from ..fields import nearest
from ..policies.files import check_no_pointer
from ..rewards.named import REWARDS, check_different
from .code import is_named_object, named_object
from .rows import read_rows
from .task import Task, is_prompt, parameters, prompt_key


# Those that TRL's own script knows by these names.
OF_TRL = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")
# What a trainer hands to a reward function beside the columns.
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


# ------------------------------------------------------------------------------------------------------------- rewards


def load_reward(name: str) -> Callable:
    """
    A reward function: one of [`REWARDS`], one of TRL's script, or the user's own, as `module.NAME` or `FILE.py:NAME`.

    Raises:
        ValueError, FileNotFoundError: if there is no such function.
    """
    if name in REWARDS:
        return REWARDS[name]
    if name in OF_TRL:
        from trl import rewards

        if name == "get_soft_overlong_punishment":  # with the values of TRL's script
            return rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
        return getattr(rewards, name)
    if not is_named_object(name):
        known = sorted({*REWARDS, *OF_TRL})
        near = nearest(name, known)
        hint = f" Is it meant to be {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"Unknown reward function {name!r}; there are {known}, and your own, as FILE.py:FUNCTION or module.FUNCTION.{hint}"
        )
    found = named_object(name, "reward function")
    if not callable(found) or isinstance(found, type):
        raise ValueError(f"The reward function {name} must be a function, got {found!r:.80}.")
    return found


def load_rewards(names: Iterable[str]) -> list[Callable]:
    """Reward functions by their names, which must differ: metrics are called after them."""
    functions = [load_reward(name) for name in names]
    called = [getattr(one, "__name__", type(one).__name__) for one in functions]
    check_different(called)
    return functions


def check_columns(function: Callable, names: Iterable[str], where: str) -> None:
    """Raises a `ValueError` if a reward function needs a column that the rows do not have."""
    found = parameters(function).values()
    all_others = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [
        one.name for one in found if one.default is one.empty and one.kind not in all_others and one.name not in _GIVEN
    ]
    if missing := [one for one in needed if one not in set(names)]:
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(f"The reward function {name} needs the columns {missing}; {where} has {sorted(names)}.")
    if found and not any(one.kind is one.VAR_KEYWORD for one in found):
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(f"The reward function {name} must take `completions` and `**kwargs`, as those of TRL do.")


# ---------------------------------------------------------------------------------------------------------------- rows


def load_splits(name: str, config: str | None = None) -> dict[str, Dataset]:
    """
    The splits of a dataset: of a directory that `save_to_disk` has written, of a data file or a directory of them, or of the hub.

    Raises:
        ValueError, FileNotFoundError: if it cannot be loaded.
    """
    path = Path(name)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            if config is not None:
                raise ValueError("a dataset on disk has no configurations: leave `--dataset_config` out")
            found = load_from_disk(name)
        elif path.is_file():
            if path.suffix not in _BUILDERS:
                raise ValueError(f"a data file must end in one of {sorted(_BUILDERS)}")
            check_no_pointer(path)
            found = load_dataset(_BUILDERS[path.suffix], name=config, data_files=name)
        else:
            found = load_dataset(name, name=config)
    except Exception as error:  # of the hub, of the network, of Arrow, of a loader
        message = " ".join(str(error).split()) or type(error).__name__
        where = "" if path.exists() else " There is no such file or directory here."
        raise ValueError(f"The dataset {name} cannot be loaded: {message:.300}.{where}") from error
    if isinstance(found, Dataset):
        return {"": found}
    assert isinstance(found, DatasetDict)
    return dict(found)


def split_of(splits: dict[str, Dataset], name: str, option: str, dataset: str) -> Dataset:
    """
    A split by its name. A dataset without splits is that for training.

    Raises:
        ValueError: if there is no such split.
    """
    if name not in splits and not (list(splits) == [""] and option == "dataset_train_split"):
        raise ValueError(f"The dataset {dataset} has no split {name!r} (`--{option}`); it has {sorted(splits)}.")
    return splits.get(name, splits.get("", Dataset.from_dict({})))


def rows_of_file(path: str) -> Dataset:
    """
    The rows of a `.csv`, `.json` or `.jsonl` file.

    Raises:
        ValueError, FileNotFoundError: naming the file, if it is not as [`read_rows`] wants it, or a column holds values of several
            kinds.
    """
    rows = read_rows(path)
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except (TypeError, ValueError) as error:  # of Arrow
        message = " ".join(str(error).split())
        raise ValueError(f"{path}: the values of a column must be of one kind ({message:.200}).") from error


def prompt_of(row: dict[str, Any], system_prompt: str | None, where: str) -> Any:
    """
    The prompt of a row: its `prompt`, or its `messages` without the answer at the end.

    Args:
        row (`dict[str, Any]`): the row.
        system_prompt (`str`, *optional*): a message of the system that comes first. A prompt that is text becomes the user's message.
        where (`str`): the row, for messages.

    Raises:
        ValueError: if there is none, or it has a message of the system already.
    """
    if "prompt" in row:
        prompt = row["prompt"]
    else:
        prompt = list(row["messages"] or []) if isinstance(row["messages"], list | tuple) else row["messages"]
        while (
            isinstance(prompt, list)
            and prompt
            and isinstance(prompt[-1], dict)
            and prompt[-1].get("role") == "assistant"
        ):
            prompt.pop()
    if not is_prompt(prompt):
        raise ValueError(
            f"{where}: the prompt must be text, or messages with `role` and `content`, got {prompt!r:.80}."
        )
    if system_prompt is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages[0]["role"] == "system":
        raise ValueError(f"{where} has a message of the system already: leave `--system_prompt` out.")
    return [{"role": "system", "content": system_prompt}, *messages]


def _with_prompts(rows: Dataset, kept: list[int], system_prompt: str | None, where: str) -> Dataset:
    """Some of the rows, each with its prompt."""
    prompts = [
        prompt_of(row, system_prompt, f"{where}, row {number}")
        for number, row in zip(kept, _prompt_columns(rows.select(kept)), strict=True)
    ]
    if len({isinstance(one, str) for one in prompts}) > 1:
        raise ValueError(f"{where}: some prompts are text and some are messages. Write all of them in one way.")
    others = [name for name in rows.column_names if name not in ("prompt", "messages")]
    columns = {name: list(rows.select(kept)[name]) for name in others}
    return Dataset.from_dict({"prompt": prompts, **columns})


def _prompt_columns(rows: Dataset) -> Dataset:
    return rows.select_columns(["prompt" if "prompt" in rows.column_names else "messages"])


def _check_rows(rows: Dataset, where: str) -> None:
    if not len(rows):
        raise ValueError(f"{where} has no rows.")
    if taken := sorted({*_GIVEN} & set(rows.column_names)):
        raise ValueError(f"{where} has the columns {taken}, which reward functions get from elsewhere. Rename them.")
    if not {"prompt", "messages"} & set(rows.column_names):
        raise ValueError(f"{where} must have a column `prompt` or `messages`; it has {sorted(rows.column_names)}.")


def _key(row: dict[str, Any]) -> str:
    return prompt_key(row["prompt"] if "prompt" in row else row["messages"])


def task_of_data(
    name: str,
    train: Dataset | None,
    evaluation: Dataset | None,
    reward_funcs: list[Callable],
    train_size: int,
    eval_size: int,
    system_prompt: str | None = None,
) -> Task:
    """
    A task of rows and reward functions, without a checker: what is measured is the mean of the first reward.

    Args:
        name (`str`): where the rows are from.
        train (`Dataset`, *optional*): rows with a `prompt`, text or messages, or with `messages`. None, if nothing is trained.
        evaluation (`Dataset`, *optional*): rows to measure on. Without them, the last rows of `train`, at most half of them.
        reward_funcs (`list`): reward functions.
        train_size, eval_size (`int`): most rows.
        system_prompt (`str`, *optional*): a message of the system before each prompt.

    Raises:
        ValueError: if a column is missing, a row has no prompt, or nothing is left to train or to measure on.
    """
    if train is None:
        assert evaluation is not None
        _check_rows(evaluation, name)
        rows = _with_prompts(evaluation, list(range(min(eval_size, len(evaluation)))), system_prompt, name)
        check_columns(reward_funcs[0], rows.column_names, name)
        return Task(name, "rows", rows.select([]), rows, list(reward_funcs))
    _check_rows(train, name)
    places = list(range(len(train)))
    if evaluation is None:
        size = min(eval_size, len(train) // 2)
        if not size:
            raise ValueError(f"{name} has a single row: nothing is left to measure on. Give `--eval_file`.")
        places, held_out, kept = places[:-size], train, places[-size:]
    else:
        _check_rows(evaluation, f"{name}, for measuring,")
        held_out, kept = evaluation, list(range(min(eval_size, len(evaluation))))
    seen = {_key(row) for row in _prompt_columns(held_out.select(kept))}
    keys = map(_key, _prompt_columns(train))
    chosen = [place for place, key in zip(places, keys, strict=False) if key not in seen][:train_size]
    if not chosen:
        raise ValueError(
            f"Every prompt of {name} is among those to measure on: nothing is left to train on. Measure on other rows (`--eval_file` or "
            "`--dataset_test_split`)."
        )
    task = Task(
        name,
        "rows",
        _with_prompts(train, chosen, system_prompt, name),
        _with_prompts(held_out, kept, system_prompt, name),
        list(reward_funcs),
    )
    for function in reward_funcs:
        check_columns(function, task.train.column_names, name)
    check_columns(reward_funcs[0], task.evaluation.column_names, f"{name}, for measuring,")
    return task


def fingerprint_rows(rows: Dataset) -> str:
    """What tells rows from others: a digest of what they hold."""
    import xxhash

    digest = xxhash.xxh3_128()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()
