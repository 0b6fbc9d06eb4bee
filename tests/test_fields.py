"""Fields of configs are checked by what they say of themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

import pytest
from transformers import HfArgumentParser

from trl_diffusion.fields import AtLeast, Within, check_fields, explained, with_default


@dataclass
@explained
class Example:
    """
    An example.

    Args:
        count (`int`, *optional*, defaults to `2`):
            How many `things`, up to
            100 %.
        mode (`str`, *optional*, defaults to `"slow"`):
            Which one.
    """

    count: Annotated[int, AtLeast(1)] = 2
    share: Annotated[float, Within("(0, 1]")] | None = None
    mode: str = field(default="slow", metadata={"choices": ("slow", "fast")})
    side: Literal["left", "right"] | None = None
    loud: bool = False
    free: str = ""
    plain: int = 0
    ratio: float = 1
    names: list[str] | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "`count` must be a whole number of at least 1, got 0."),
        ({"count": 1.0}, "`count` must be a whole number of at least 1, got 1.0."),
        ({"count": True}, "`count` must be a whole number of at least 1, got True."),
        ({"count": None}, "`count` must be a whole number of at least 1, got None."),
        ({"count": "3"}, "`count` must be a whole number of at least 1, got '3'."),
        ({"share": 0}, "`share` must be a number above 0 and at most 1, got 0."),
        ({"share": math.nan}, "`share` must be a number above 0 and at most 1, got nan."),
        ({"share": "0.5"}, "`share` must be a number above 0 and at most 1, got '0.5'."),
        ({"share": True}, "`share` must be a number above 0 and at most 1, got True."),
        ({"mode": "Fast"}, "`mode` must be one of ['slow', 'fast'], got 'Fast'."),
        ({"mode": None}, "`mode` must be one of ['slow', 'fast'], got None."),
        ({"side": "top"}, "`side` must be one of ['left', 'right'], got 'top'."),
        ({"loud": "no"}, "`loud` must be true or false, got 'no'."),
        ({"free": 3}, "`free` must be text, got 3."),
        ({"plain": True}, "`plain` must be a whole number, got True."),
        ({"plain": 2.5}, "`plain` must be a whole number, got 2.5."),
        ({"ratio": "0.5"}, "`ratio` must be a number, got '0.5'."),
        ({"names": "one"}, "`names` must be a list, each entry text, got 'one'."),
        ({"names": ["one", 2]}, "`names` must be a list, each entry text, got ['one', 2]."),
    ],
)
def test_values_that_cannot_be(values, message):
    with pytest.raises(ValueError) as error:
        check_fields(Example(**values))
    assert str(error.value) == message
    check_fields(Example(**values), {"other"})


def test_values_that_can_be():
    check_fields(Example())
    check_fields(Example(1, 1, "fast", "left", True, "anything"))
    check_fields(Example(share=1e-9))


def test_help_is_the_docstring():
    texts = {one.name: one.metadata.get("help") for one in fields(Example)}
    assert texts["count"] == "How many things, up to 100 %%." and texts["mode"] == "Which one."
    assert texts["free"] is None
    parser = HfArgumentParser(Example)  # neither ranges nor choices are in its way
    assert "up to 100 %." in " ".join(parser.format_help().split())
    (parsed,) = parser.parse_args_into_dataclasses(["--count", "3", "--share", "0.5", "--side", "right"])
    assert parsed == Example(3, 0.5, side="right")


def test_a_docstring_that_explains_no_field_is_a_mistake():
    with pytest.raises(TypeError, match="explains `size`, which is none of its fields"):

        @explained
        class Wrong:
            """
            Args:
                size (`int`):
                    Something.
            """

            count: int = 1

        del Wrong


def test_another_default():
    @dataclass
    class Other(Example):
        count: int = with_default(Example, "count", 5)

    assert Other().count == 5 and Example().count == 2
    assert Other.__dataclass_fields__["count"].metadata == Example.__dataclass_fields__["count"].metadata
