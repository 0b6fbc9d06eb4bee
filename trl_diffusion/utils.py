"""Small things that several parts share."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from safetensors import SafetensorError

from . import __version__
from .errors import note_of, say_error
from .names import other_names


# What a user can set right: options, files, data, what is installed, a policy whose numbers are not finite.
USER_ERRORS = (FloatingPointError, ImportError, OSError, OverflowError, SafetensorError, ValueError, yaml.YAMLError)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch draws on the CPU from this seed. The global random state is afterwards what it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def exit_code(work: Callable[[], object]) -> int:
    """Does the work of a command: 0, or 2 after one line on stderr that says what the user can set right."""
    try:
        work()
    except Exception as error:
        _say(error)
        return 2
    return 0


def _say(error: Exception) -> None:
    """Prints one line on stderr about what a user can set right. Raises other errors again."""
    if not isinstance(error, USER_ERRORS) and note_of(error) is None:
        raise error
    say_error(printable(" ".join((note_of(error) or str(error)).split())))


def printable(text: str) -> str:
    r"""
    A text as a terminal may show it: control characters, with which escape sequences begin, are written as in Python
    (`\x1b`). Line feeds and tabs stay.
    """
    return "".join(_spelled(one) if _is_control(one) else one for one in text)


def _is_control(one: str) -> bool:
    return one not in "\n\t" and (one < " " or "\x7f" <= one <= "\x9f" or "\ud800" <= one <= "\udfff")


def _spelled(one: str) -> str:
    return one.encode("unicode_escape").decode()


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Inside, what a user can set right ends the program with its message and code 2, without a traceback."""
    try:
        yield
    except Exception as error:
        _say(error)
        raise SystemExit(2) from None


class _OnceLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which would keep the last one of repeated keys, and take `None` for a value that is not there.
    This one refuses both."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if name in lines:
                    raise ValueError(f"line {line}: the key {key.value!r} is already in line {lines[name]}.")
                lines[name] = line
                if isinstance(value, yaml.ScalarNode) and value.value == "" and value.style is None:
                    raise ValueError(
                        f"line {line}: the key {key.value!r} has no value. Write one (`null` for none), or leave the line out."
                    )
        return node


def load_yaml(path: str | Path) -> Any:
    """
    What a YAML or JSON file holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file and the line, if it is not YAML, or gives a key twice or without a value.
    """
    return _parse_yaml(read_text(path), str(path))


def read_text(path: str | Path) -> str:
    """
    The text of a file, without the byte order mark that Excel and Notepad put before it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from error


def read_record(path: str | Path, keys: Iterable[str] = (), advice: str = "") -> dict[str, Any]:
    """
    The object that a JSON file holds.

    Args:
        path (`str` or `Path`): the file.
        keys (`Iterable[str]`, *optional*): what the object must have.
        advice (`str`, *optional*): what to do about a damaged file, for the message.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is not UTF-8 or not JSON, holds something else than an object, or lacks a key.
    """
    text, advice = read_text(path), f" {advice}" if advice else ""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        what = "it is empty" if not text.strip() else str(error)
        raise ValueError(f"{path} is not JSON ({what}).{advice}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {_shown(found)}.{advice}")
    missing = sorted(set(keys) - set(found))
    if missing:
        raise ValueError(f"{path} lacks {missing}; it has {sorted(found)}.{advice}")
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_OnceLoader)  # noqa: S506  (a safe loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{where}: {line}{error.problem or error.context}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error


def no_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """
    The `object_pairs_hook` for `json.loads`, which would keep the last one of repeated keys.

    Raises:
        ValueError: naming the key, if there is one.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"The key {next(name for name in names if names.count(name) > 1)!r} is given twice.")
    return found


def check_config_file(arguments: list[str] | None, kinds: Collection[type] = ()) -> list[str]:
    """
    The arguments of a command, if the YAML file behind `--config` gives no key twice.

    Args:
        arguments (`list[str]`, *optional*): the arguments. Defaults to those of the command line.
        kinds (`Collection[type]`, *optional*): the dataclasses whose fields are the options. Any option will do if there is none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file and the line, if it is not YAML, gives a key twice or without a value, or holds something
            else than options that are known.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[-1:] == ["--config"]:
        raise ValueError("--config is followed by no path. Give that of a YAML file.")
    for option, path in zip(arguments, arguments[1:], strict=False):
        if option == "--config":
            found = load_yaml(path)
            if not isinstance(found, dict):
                raise ValueError(f"{path} must hold options, each as `name: value`, got {_shown(found)}.")
            if kinds:
                check_options(path, set(found) - {"env"}, kinds)
    return arguments


def check_options(where: str, names: Iterable[str], kinds: Iterable[type]) -> None:
    """
    Checks that options of a command are known.

    Args:
        where (`str`): where they were given, for the message.
        names (`Iterable[str]`): their names.
        kinds (`Iterable[type]`): the dataclasses whose fields are the options of the command.

    Raises:
        ValueError: naming those that are not known, and what they may be meant to be.
    """
    known = sorted(one.name for kind in kinds for one in fields(kind) if one.init)
    unknown = sorted(set(names) - set(known), key=str)
    if unknown:
        near = {str(name): other_names(str(name), known) for name in unknown}
        near = {name: same or get_close_matches(name, known, 1) for name, same in near.items()}
        hint = "".join(f" Is {name} meant to be {names[0]}?" for name, names in near.items() if names)
        raise ValueError(f"{where}: unknown options {unknown}; --help lists those that there are.{hint}")


def read_mapping(value: str | Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """
    A mapping that was given on the command line: as `name:value+name:value`, as JSON, or as the path of a `.json` or
    `.yaml` file.

    Raises:
        ValueError: if it is none of these, or gives a name twice.
    """
    if value is None or isinstance(value, Mapping):
        return dict(value or {})
    text = str(value).strip()
    if text.endswith((".json", ".yaml", ".yml")):
        if not Path(text).is_file():
            raise ValueError(f"`{name}`: there is no file {text}.")
        found = load_yaml(text)
    else:
        if not text.startswith("{"):
            text = "\n".join(part.replace(":", ": ", 1) for part in text.split("+"))
        found = _said(text, name)
    if not isinstance(found, dict):
        raise ValueError(
            f"`{name}` must be like name:value+name:value, a JSON object, or the path of a JSON or YAML file; "
            f"got {value!r}."
        )
    return found


def _said(text: str, name: str) -> Any:
    """What a text on the command line says, `None` if it cannot be read."""
    try:
        return _parse_yaml(text, f"`{name}`")
    except ValueError as error:
        if isinstance(error.__cause__, yaml.YAMLError):
            return None
        raise


def use_all_cores() -> None:
    """
    Shares the cores among the processes of this machine; `accelerate launch` gives each process just one.

    Raises:
        ValueError: if LOCAL_WORLD_SIZE, which says how many processes there are, is no whole number of at least 1.
    """
    given = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(
            f"The environment variable LOCAL_WORLD_SIZE must be a whole number of at least 1, got {given!r}. Unset it, or set "
            "it to the number of processes on this machine."
        )
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(given)))


def check_writable(directory: str | Path, option: str) -> None:
    """
    Checks that files can be written to a directory, which may not be there yet. Nothing is left behind.

    Args:
        directory (`str` or `Path`): the directory.
        option (`str`): the option that names it, for the message.

    Raises:
        ValueError: naming the directory and the option, if they cannot.
    """
    there = Path(directory).absolute()
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    try:
        descriptor, name = tempfile.mkstemp(dir=there, prefix=TEMPORARY)
        os.close(descriptor)
        Path(name).unlink(missing_ok=True)  # another process may have cleared it away
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(
            f"Nothing can be written to {directory} ({there}: {why}). Choose another `{option}`."
        ) from error


TEMPORARY = ".unfinished-"  # how the names of files begin that are being written


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """
    A file that is there whole or not at all. Gives the path to write to; when the block ends without an error, what was
    written there is put in its place, on the disk and not only in its cache.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file that is there whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def versions() -> dict[str, str]:
    """The versions of this package, of Python, and of the libraries that figures of a run depend on."""
    found = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets")}
    return {"trl_diffusion": __version__, "python": platform.python_version(), **found}


def processes() -> PartialState:
    """The processes that share the work; on machines without an accelerator, too, where accelerate has to be told."""
    return PartialState(cpu=not torch.accelerator.is_available())


def wilson(share: float, number: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Wilson's score interval of a share.

    Args:
        share (`float`): observed share of right answers.
        number (`int`): answers.
        confidence (`float`, *optional*, defaults to `0.95`): chance that such an interval covers the true share.

    Raises:
        ValueError: if the share or the confidence is not between 0 and 1, or there is no answer.
    """
    if not 0 <= share <= 1 or not 0 < confidence < 1 or number < 1:
        raise ValueError(f"There is no interval for a share of {share} of {number} at confidence {confidence}.")
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))  # exact at 0 and at 1, too


# 97.5 % quantiles of Student's t distribution, by degrees of freedom from 1 on.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101,
    2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution with so many degrees of freedom. From 30 on, that with 30: a little too large."""
    return _STUDENT[min(freedom, len(_STUDENT)) - 1]


def half_width(values: Sequence[float]) -> float:
    """
    Half of the width of a 95 % interval for the mean of normally distributed values, by Student's t distribution.

    Args:
        values (`Sequence[float]`): independent values, such as one for each seed.

    Raises:
        ValueError: if there are fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"An interval needs at least two values, got {len(values)}.")
    return student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
