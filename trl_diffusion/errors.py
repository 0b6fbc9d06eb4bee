"""
The line of an error on stderr. Several processes of a launch that all find the same mistake say it once. An error in code of the
user's own names the place.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# Variable of the environment: a directory in which the processes of a launch note which lines they have printed.
SAID = "TRL_DIFFUSION_SAID"


def say_error(message: str) -> None:
    """Prints the line of an error, unless another process of this launch has printed the same one."""
    line = f"error: {message}"
    if _is_first(line):
        print(line, file=sys.stderr)


def _is_first(line: str) -> bool:
    directory = os.environ.get(SAID)
    if directory is None:
        return True
    try:
        Path(directory, hashlib.sha256(line.encode("utf-8", "replace")).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # of another machine, or gone with its launch
        pass
    return True


@contextmanager
def code_of(what: str) -> Iterator[None]:
    """Inside, code of the user's own runs. An error of it leaves as it is, and with a note for [`note_of`]."""
    try:
        yield
    except Exception as error:
        if not note_of(error):
            places = traceback.extract_tb(error.__traceback__)
            place = next((one for one in reversed(places) if not one.filename.startswith(_LIBRARY)), places[-1])
            kind = type(error).__name__
            error.add_note(f"{what}{_FAILED}{kind}: {error} ({Path(place.filename).name}, line {place.lineno}).")
        raise


_FAILED = " has failed: "
_LIBRARY = sysconfig.get_path("stdlib")  # and what is installed below it


def note_of(error: BaseException) -> str | None:
    """What failed and where, if an error comes from code of the user's own."""
    return next((note for note in getattr(error, "__notes__", ()) if _FAILED in note), None)
