"""What TRL hands to a reward function."""

from __future__ import annotations


def texts(completions: list) -> list[str]:
    """The text of each completion, standard (a string) or conversational (a list of messages)."""
    return [item if isinstance(item, str) else item[-1]["content"] for item in completions]
