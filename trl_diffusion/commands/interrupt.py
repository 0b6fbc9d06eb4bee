"""
Ctrl-C ends a command with one line, which says what is kept and how to go on, and with exit code 130, as shells expect. No
traceback is printed, whether the command is still being imported, computes, or runs on several processes.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn


INTERRUPTED = 128 + signal.SIGINT
TYPED = "TRL_DIFFUSION_COMMAND"  # variable of the environment with the command as it was typed, for processes that it starts


@contextmanager
def ending_in_a_line(kept: Callable[[], str] = lambda: "") -> Iterator[None]:
    """
    Inside, Ctrl-C ends the program with exit code 130 and one line on stderr.

    Args:
        kept (`Callable[[], str]`, *optional*): what the line says about the work so far, such as "3 of 5 shards are kept."
    """
    try:
        try:
            yield
        except BaseException:
            _take_pending()  # another process may have ended first, and what this one has raised is the consequence
            raise
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the line is not interrupted
        _end(kept())


def _take_pending() -> None:
    """Python handles a Ctrl-C that came meanwhile when a function is called."""


def typed() -> str:
    """The command as it was typed, as far as it is known: what starts with `accelerate launch` knows its own part."""
    return os.environ.get(TYPED) or shlex.join(sys.argv)


def is_part() -> bool:
    """Whether another command, `iterate`, has started this one."""
    return shlex.split(os.environ.get(TYPED, ""))[1:2] == ["iterate"]


def how_to_go_on(*options: str) -> str:
    """
    The sentence that says how to go on.

    Args:
        options (`str`): words that the command needs for that, such as `"--resume_from_checkpoint"` and `"true"`.
    """
    words = shlex.split(os.environ.get(TYPED, ""))
    needed = [] if is_part() or not options or options[0] in words else list(options)
    if words:
        return f"To go on: {shlex.join([*words, *needed])}"
    return f"To go on, give the same command again{f' with {shlex.join(needed)}' if needed else ''}."


def end_imports_in_a_line() -> None:
    """From now on, a Ctrl-C that nothing catches ends the program in the same way. Commands call it before they import anything."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            _end(how_to_go_on() if is_part() else "", at_once=True)
        before(kind, error, trace)

    if getattr(before, "__module__", None) != __name__:
        sys.excepthook = hook


@contextmanager
def left_to_the_child() -> Iterator[None]:
    """Inside, this process ignores Ctrl-C, which a process that it has started gets as well, and answers."""
    before = signal.signal(
        signal.SIGINT, lambda *_: None
    )  # a function, unlike `SIG_IGN`, is not passed on to the child
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(kept: str, at_once: bool = False) -> NoReturn:
    """Ends the program with the line, which the first of several processes prints."""
    if int(os.environ.get("RANK", "0")) == 0:
        # A terminal shows ^C where the cursor is.
        print(f"{chr(10) if sys.stderr.isatty() else ''}{f'Stopped by Ctrl-C. {kept}'.strip()}", file=sys.stderr)
    if at_once or int(os.environ.get("WORLD_SIZE", "1")) > 1:  # or this process would wait for the other ones
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    raise SystemExit(INTERRUPTED) from None
