"""Functions that users name: `FILE.py:NAME`, or `module.NAME`."""

from __future__ import annotations

import importlib
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from ..fields import nearest


def is_named_object(text: str) -> bool:
    """Whether a text is of the form `FILE.py:NAME`, `FILE.py` or `module.NAME`."""
    is_module = "." in text and all(part.isidentifier() for part in text.split("."))
    return _split(text) is not None or text.endswith(".py") or is_module


def _split(text: str) -> tuple[Path, str] | None:
    """File and name of `FILE.py:NAME`."""
    path, colon, name = text.rpartition(":")
    return (Path(path), name) if colon and path.endswith(".py") else None


def object_file(text: str) -> str:
    """What a text names, for messages: the file and the name in it."""
    return f"{text}()" if _split(text) is None else f"{_split(text)[0]}: {_split(text)[1]}()"  # type: ignore[index]


def named_object(text: str, what: str) -> Any:
    """
    What `FILE.py:NAME` or `module.NAME` names. The file is run, or the module imported; modules are searched in the current directory,
    too.

    Args:
        text (`str`): file and name, or module and name.
        what (`str`): what it is for, for messages.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it cannot be run, or has nothing of that name.
    """
    split = _split(text)
    if split is None and text.endswith(".py"):
        raise ValueError(f"The {what} {text!r} names no function. Write {text}:FUNCTION.")
    if split is not None:
        path, name = split
        module, where = _run(path, what), str(path)
    else:
        where, _, name = text.rpartition(".")
        module = _import(where, text, what)
    if not name or name not in vars(module):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        own = [key for key in own if getattr(getattr(module, key), "__module__", None) == module.__name__]
        near = nearest(name, own) if name else []
        hint = f" Is it meant to be {' or '.join(near)}?" if near else f" It has {sorted(own)[:8]}."
        raise ValueError(f"{where} has nothing that is called {name!r}.{hint}")
    return getattr(module, name)


def _run(path: Path, what: str) -> ModuleType:
    """The module of a file."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} for the {what}.")
    module_name = "_file_" + re.sub(r"\W", "_", str(path.resolve().with_suffix("")))
    spec = spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.modules[module_name] = module  # dataclasses and pickle look for it
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ValueError(f"{path} cannot be run: {_told(error, path)}.") from error
    finally:
        sys.path.remove(folder)
    return module


def _import(name: str, text: str, what: str) -> ModuleType:
    """A module by its name, which may lie in the current directory."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(
                f"There is no module {name!r} for the {what} {text!r}. Write FILE.py:NAME for a function of a file."
            ) from error
        raise ValueError(f"The module {name} cannot be imported: {error}.") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"The module {name} cannot be imported: {_told(error, Path(name))}.") from error
    finally:
        sys.path.remove(here)


def _told(error: BaseException, path: Path) -> str:
    """An error and the line of the file in which it came up."""
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename in (str(path), str(path.resolve())):
            line = step.tb_lineno
        step = step.tb_next
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {message}" + (f" (line {line})" if line else "")
