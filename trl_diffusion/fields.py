"""
What a field of a config says about its own values, and the checks that read it.

A field says it in its type (`bool`, `int`, `float`, `str`, a list of these, `Literal`, `Annotated[int, AtLeast(1)]`,
`Annotated[float, Within("[0, 1]")]`) or, for a choice, in `metadata["choices"]`, which argparse reads, too. `None` is allowed
where it is the default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from inspect import cleandoc
from numbers import Real
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .names import other_names


T = TypeVar("T")


@dataclass(frozen=True)
class AtLeast:
    """A whole number of at least `least`."""

    least: int


@dataclass(frozen=True)
class Within:
    """A number within an interval such as `"(0, inf)"`; a round bracket leaves the end out."""

    interval: str


class Suggestions(tuple):
    """Choices that a shell completes and `--help` names, while any other value is allowed."""

    def __contains__(self, value: object) -> bool:
        return True


def check_at_least(name: str, value: Any, least: int = 1) -> None:
    """Raises a `ValueError` that names the option, if its value is no whole number or less than `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")


def check_one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises a `ValueError` that names the option, if its value is none of `choices`."""
    if value not in (known := list(choices)):
        raise ValueError(f"`{name}` must be one of {known}, got {value!r}.")


def check_within(name: str, value: Any, interval: str) -> None:
    """Raises a `ValueError` that names the option, if its value is no number or outside of the interval."""
    if not is_number(value) or not _is_inside(value, interval):
        raise ValueError(f"`{name}` must be a number {_in_words(interval)}, got {value!r}.")


def check_kind(name: str, value: Any, kind: type | UnionType, what: str) -> None:
    """Raises a `TypeError` that names the argument, says what it must be, and shows what was passed in its place."""
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be {what}, got {value!r:.80} ({type(value).__name__}).")


def check_names(what: str, names: Iterable[str], kind: type) -> None:
    """Raises a `ValueError` if some names are no fields of the dataclass `kind`; `what` says what they name."""
    known = sorted(one.name for one in fields(kind))
    unknown = sorted(set(names) - set(known))
    if unknown:
        near = {name: nearest(str(name), known) for name in unknown}
        hint = "".join(f" Is {name} meant to be {' or '.join(names)}?" for name, names in near.items() if names)
        raise ValueError(f"Unknown {what} {unknown}; there are {known}.{hint}")


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The names that another, a mistyped or a shortened one may stand for: that of the same setting, or else up to three that
    begin with it, or else the most similar one."""
    known = sorted(set(known))
    begun = [one for one in known if one.startswith(name)][:3]
    return other_names(name, known) or begun or get_close_matches(name, known, 1)


def check_fields(config: Any, names: Collection[str] | None = None) -> None:
    """
    Checks the fields of a dataclass for which their own type or metadata says what they may be.

    Args:
        config: an instance of a dataclass.
        names (`Collection[str]`, *optional*): fields to check. Defaults to all.

    Raises:
        ValueError: naming the field, its value, and what it must be.
    """
    hints = _hints(type(config))  # type: ignore[arg-type]  # a class is hashable
    for one in fields(config):
        value = getattr(config, one.name)
        if (names is not None and one.name not in names) or (value is None and one.default is None):
            continue
        kind, rules = _without_none(hints[one.name])
        choices = get_args(kind) if get_origin(kind) is Literal else one.metadata.get("choices")
        if choices is not None and not isinstance(choices, Suggestions):
            check_one_of(one.name, value, choices)
        elif not rules and not _is_of(kind, value):
            raise ValueError(f"`{one.name}` must be {_in_kind(kind)}, got {value!r}.")
        for rule in rules:
            if isinstance(rule, AtLeast):
                check_at_least(one.name, value, rule.least)
            elif isinstance(rule, Within):
                check_within(one.name, value, rule.interval)


_KINDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value is of one of the kinds above, or a list of them; any value is of any other kind."""
    if get_origin(kind) is list:
        return isinstance(value, list | tuple) and all(_is_of(get_args(kind)[0], one) for one in value)
    if kind is float:
        return is_number(value)
    return kind not in _KINDS or type(value) is kind or (kind is str and isinstance(value, str))


def _in_kind(kind: Any) -> str:
    """What a value of a kind must be, in words."""
    return _KINDS[kind] if kind in _KINDS else f"a list, each entry {_KINDS[get_args(kind)[0]]}"


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _without_none(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without `None` and `Annotated`, and what it was annotated with."""
    if get_origin(kind) in (Union, UnionType):
        kinds = [one for one in get_args(kind) if one is not type(None)]
        return _without_none(kinds[0]) if len(kinds) == 1 else (kind, ())
    if get_origin(kind) is Annotated:
        inner, *rules = get_args(kind)
        return _without_none(inner)[0], tuple(rules)
    return kind, ()


# ------------------------------------------------------------------------------------------------------------ intervals


def is_number(value: Any) -> bool:
    """Whether a value is a number, which a truth value is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _ends(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)


def _is_inside(value: float, interval: str) -> bool:
    low, high = _ends(interval)
    above = value > low if interval[0] == "(" else value >= low  # False for NaN
    return above and (value < high if interval[-1] == ")" else value <= high)


def _in_words(interval: str) -> str:
    low, high = _ends(interval)
    if low == -math.inf:
        return "that is finite"
    text = f"above {low:g}" if interval[0] == "(" else f"of at least {low:g}"
    if math.isfinite(high):
        return f"{text} and {'below' if interval[-1] == ')' else 'at most'} {high:g}"
    return f"{text} and finite" if interval[-1] == ")" else text


# ----------------------------------------------------------------------------------------------- help texts and defaults


def explained(kind: type[T]) -> type[T]:
    """
    A class decorator, to be put below `@dataclass`: each field gets the help text that argparse shows, which is its
    paragraph under `Args:` in the docstring of the class.
    """
    text = f"{cleandoc(kind.__doc__ or '')}\n"
    found = re.findall(r"^ {4}(\w+) \(.*?\):\n((?: {8}.*\n)+)", text, re.MULTILINE)
    for name, paragraph in found:
        if name not in kind.__annotations__:
            raise TypeError(f"The docstring of {kind.__name__} explains `{name}`, which is none of its fields.")
        own = vars(kind).get(name, MISSING)
        own = own if isinstance(own, Field) else field(default=own)
        text = " ".join(paragraph.split()).replace("`", "").replace("%", "%%")
        own.metadata = MappingProxyType({**own.metadata, "help": text})
        setattr(kind, name, own)
    return kind


def with_default(kind: type, name: str, default: T) -> T:
    """For the body of a dataclass that inherits from `kind`: its field of this name, with another default."""
    inherited = kind.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return field(default=default, metadata=inherited.metadata, kw_only=inherited.kw_only)
