"""Files of documents and of preference pairs."""

from __future__ import annotations

from typing import Any

from .rows import read_rows


def document(prompt: Any, answer: str) -> dict[str, Any]:
    """A prompt, as text or as messages, and a text that answers it, in TRL's format of prompts and completions."""
    completion = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
    return {"prompt": prompt, "completion": completion}


def sft_rows(path: str) -> list[dict[str, Any]]:
    """The documents of a file in one of TRL's formats: `messages`, `prompt` and `completion`, or `text`. No other column is kept."""
    rows = read_rows(path)
    names = next((names for names in FORMATS if all(name in rows[0] for name in names)), None)
    if names is None:
        raise ValueError(
            f"{path}: row 0 has the columns {sorted(rows[0])}; documents have `messages`, or `prompt` and `completion`, or `text`."
        )
    kinds = set()
    for number, row in enumerate(rows):
        for name in names:
            value = row.get(name)
            if not (are_messages(value) or (name != "messages" and isinstance(value, str) and value)):
                what = "a list of messages" if name == "messages" else "text or a list of messages"
                raise ValueError(f"{path}, row {number}: `{name}` must be {what}, got {value!r:.80}.")
            kinds.add(isinstance(value, str))
    if len(kinds) > 1:
        raise ValueError(
            f"{path}: some of {list(names)} are text and some are messages. Write all of them in one way."
        )
    return [{name: row[name] for name in names} for row in rows]


FORMATS = (("messages",), ("prompt", "completion"), ("text",))  # of documents, by the columns that they have


def are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "role" in one for one in value)


def preference_rows(path: str) -> list[dict[str, Any]]:
    """The pairs of a file, each `chosen` and `rejected`, and perhaps a `prompt`: text, or messages."""
    rows = read_rows(path)
    for number, row in enumerate(rows):
        for name in ("chosen", "rejected", *(["prompt"] if "prompt" in row else [])):
            value = row.get(name)
            if not are_messages(value) and not (isinstance(value, str) and value):
                raise ValueError(
                    f"{path}, row {number}: `{name}` must be text or a list of messages, got {value!r:.80}."
                )
    return rows
