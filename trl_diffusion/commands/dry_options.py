"""Reading the options of a rehearsal: every mistake in them is found, not the first one alone."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import is_torch_bf16_gpu_available

from ..rehearsal.findings import Findings, one_line
from ..utils import USER_ERRORS
from .settings import given_options, options_in


MOST = 10  # mistakes in options that are looked for
# What an option that TRL derives is made of.
MADE_OF = {
    "generation_batch_size": (
        "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_generations",
    ),
}  # fmt: skip
PART = "options"


def read_all(
    findings: Findings,
    parse: Callable[[list[str]], tuple[Any, ...]],
    words: list[str],
    complete: Callable[[list[str]], list[str]] = list,
) -> tuple[Any, ...] | None:
    """
    Reads the options of a command. After a mistake, the options that its message names are left out, and the rest is read again.

    Args:
        findings ([`Findings`]): where to note the mistakes.
        parse (`Callable`): reads the words of a command line, or raises.
        words (`list[str]`): the words.
        complete (`Callable`, *optional*): adds the `--config` that applies to the words.

    Returns:
        What `parse` returns, for the options that are left, or `None`.
    """
    with tempfile.TemporaryDirectory() as folder:
        for number in range(MOST):
            said = io.StringIO()
            try:
                with redirect_stderr(said):
                    return parse(words)
            except (*USER_ERRORS, TypeError) as error:
                message = one_line(error)
            except SystemExit:
                message = one_line(said.getvalue()).removeprefix("error: ")
            with findings.part(PART):
                words = complete(words)
            options = all_options(words)
            derived = [part for name, parts in MADE_OF.items() if _names(message, name) for part in parts]
            named = [name for name in options if name in derived or _names(message, name)]
            if number == 0 or named:  # what names no option that is left follows from those that were left out
                findings.mistake(PART, message)
            if not named:
                return None
            words = _without(words, named, Path(folder, f"{number}.yaml"))
    return None


def all_options(words: list[str]) -> dict[str, Any]:
    """All options that are given, in the YAML file and on the command line."""
    given = given_options(words)
    return {**options_in(given.get("config")), **{name: value for name, value in given.items() if name != "config"}}


def asks_for_bf16(words: list[str]) -> bool:
    """Whether bfloat16 is asked for, which this machine cannot train in. The settings would refuse it here."""
    options = all_options(words)
    asked = str(options.get("bf16", "")).lower() in ("true", "1", "yes")
    return asked and not is_torch_bf16_gpu_available() and str(options.get("use_cpu", "")).lower() != "true"


def _names(message: str, name: str) -> bool:
    """Whether a message is about an option: as `name`, --name, 'name', name=... or name (value)."""
    name = re.escape(name)
    return re.search(rf"[`']{name}\b|--{name}\b|(?<![\w-]){name}(=| \()", message) is not None


def _without(words: list[str], names: list[str], file: Path) -> list[str]:
    """The words of a command line without some options. A YAML file is written anew to `file`."""
    kept: list[str] = []
    skipping = False
    for word in words:
        if word.startswith("--"):
            skipping = word[2:].partition("=")[0].replace("-", "_") in names
        if not skipping:
            kept.append(word)
    given = given_options(words).get("config")
    if isinstance(given, str):
        options = {name: value for name, value in options_in(given).items() if name not in names}
        file.write_text(yaml.safe_dump(options, sort_keys=False))
        kept = [str(file) if word == given else word.replace(f"--config={given}", f"--config={file}") for word in kept]
    return kept
