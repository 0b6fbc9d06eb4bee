"""Small things that several parts share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState


# What a user can set right: options, files, data, what is installed, a policy whose numbers are not finite.
USER_ERRORS = (FloatingPointError, ImportError, OSError, OverflowError, ValueError, yaml.YAMLError)


def exit_code(work: Callable[[], object]) -> int:
    """Does the work of a command: 0, or 2 after one line on stderr that says what the user can set right."""
    try:
        work()
    except USER_ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


# Of the scripts in recipes/, whose hundreds of options argparse would print before a line about one of them.
USAGE = "%(prog)s [--config FILE] [--OPTION VALUE ...], all options: %(prog)s --help"


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Inside, what a user can set right ends the program with its message and code 2, without a traceback."""
    try:
        yield
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


class _OnceLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which would keep the last one of repeated keys; this one refuses them."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if name in lines:
                    raise ValueError(f"line {line}: the key {key.value!r} is already in line {lines[name]}.")
                lines[name] = line
        return node


def load_yaml(path: str | Path) -> Any:
    """
    What a YAML or JSON file holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file and the line, if it is not YAML, or gives a key twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    return _parse_yaml(path.read_text(encoding="utf-8"), str(path))


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_OnceLoader)  # noqa: S506  (a safe loader)
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


def check_config_file(arguments: list[str] | None) -> list[str]:
    """
    The arguments of a command, if the YAML file behind `--config` gives no key twice.

    Args:
        arguments (`list[str]`, *optional*): the arguments. Defaults to those of the command line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file and the line, if it is not YAML, or gives a key twice.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for option, value in zip(arguments, arguments[1:], strict=False):
        if option == "--config":
            load_yaml(value)
    return arguments


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
        found = _read_text(text, name)
    if not isinstance(found, dict):
        raise ValueError(
            f"`{name}` must be like name:value+name:value, a JSON object, or the path of a JSON or YAML file; "
            f"got {value!r}."
        )
    return found


def _read_text(text: str, name: str) -> Any:
    """What a text on the command line says, `None` if it cannot be read."""
    try:
        return _parse_yaml(text, f"`{name}`")
    except ValueError as error:
        if isinstance(error.__cause__, yaml.YAMLError):
            return None
        raise


def use_all_cores() -> None:
    """Shares the cores among the processes of this machine; `accelerate launch` gives each process just one."""
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


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


def processes() -> PartialState:
    """The processes that share the work; on machines without an accelerator, too, where accelerate has to be told."""
    return PartialState(cpu=not torch.accelerator.is_available())
