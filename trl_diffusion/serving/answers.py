"""What a server answers: choices, and the events of a stream, as the OpenAI API defines them."""

from __future__ import annotations

import json
import secrets
import time
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from ..decoding.config import DecodingConfig
from ..trajectories.exchange import trajectory_fields
from ..trajectories.trajectory import TrajectoryBatch
from .requests import Asked


INCOMPLETE = "\ufffd"  # how a tokenizer writes the first bytes of a character


def cut_at(text: str, stops: Iterable[str]) -> tuple[str, bool]:
    """A text up to the first of some others, and whether one of them was in it."""
    places = [place for place in map(text.find, stops) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


@dataclass
class Choice:
    """
    A response, as far as it is known.

    Attributes:
        asked ([`Asked`]): the request.
        index (`int`): its place among the choices.
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        stops (`Iterable[int]`): tokens that end a response.
        sent (`str`): what of its text was streamed.
        tokens (`list[int]`): its tokens.
        is_cut (`bool`): whether its text ends with one of the texts that the request named.
        trajectory ([`TrajectoryBatch`], *optional*): the whole response. `None` as long as it is denoised, or if its text was
            cut before its end.
    """

    asked: Asked
    index: int
    tokenizer: PreTrainedTokenizerBase
    stops: Iterable[int]
    sent: str = ""
    tokens: list[int] = field(default_factory=list)
    is_cut: bool = False
    trajectory: TrajectoryBatch | None = None

    def settle(self, tokens: list[int]) -> str:
        """Takes the first tokens of the response, which will not change. Returns the text that is new."""
        ends = [place for place, token in enumerate(tokens) if token in self.stops]
        self.tokens = tokens[: ends[0] + 1] if ends else tokens
        text, self.is_cut = cut_at(self._decoded(self.tokens), self.asked.stop)
        if not self.is_cut:  # what may be the beginning of a character, or of a stop text, waits
            held = [size for stop in self.asked.stop for size in range(1, len(stop)) if text.endswith(stop[:size])]
            text = text[: len(text) - max(held, default=0)].rstrip(INCOMPLETE)
        return self._send(text)

    def finish(self, trajectory: TrajectoryBatch) -> str:
        """Takes the whole response. Returns the text that is new."""
        self.trajectory, self.tokens = trajectory, trajectory.completions()[0]
        text, self.is_cut = cut_at(self._decoded(self.tokens), self.asked.stop)
        return self._send(text)

    def _decoded(self, tokens: list[int]) -> str:
        return cast(str, self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _send(self, text: str) -> str:
        new = text[len(self.sent) :] if text.startswith(self.sent) else ""
        self.sent += new
        return new

    @property
    def finish_reason(self) -> str:
        """Why the response ends, as the OpenAI API calls it."""
        return "stop" if self.is_cut or (self.tokens and self.tokens[-1] in self.stops) else "length"

    # ----------------------------------------------------------------------------------------------------- bodies

    def whole(self) -> dict[str, Any]:
        """The choice of an answer that is not streamed."""
        text: dict[str, Any] = {"text": self.sent}
        if self.asked.chat:
            text = {"message": {"role": "assistant", "content": self.sent, "refusal": None}}
        logprobs = self._logprobs() if self.asked.logprobs else None
        return {
            "index": self.index,
            **text,
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
            **self._denoising(),
        }

    def part(self, text: str, first: bool = False, last: bool = False, **more: Any) -> dict[str, Any]:
        """The choice of an event of a stream."""
        content: dict[str, Any] = {"text": text}
        if self.asked.chat:
            content = {
                "delta": {**({"role": "assistant"} if first else {}), **({"content": text} if text or first else {})}
            }
        end = {"finish_reason": self.finish_reason, **self._denoising()} if last else {"finish_reason": None}
        return {"index": self.index, **content, "logprobs": None, **end, **more}

    def _denoising(self) -> dict[str, Any]:
        if not self.asked.denoising or self.trajectory is None:
            return {}
        return {"denoising": {"seed": self.asked.wishes[self.index].seed, **trajectory_fields(self.trajectory)}}

    def _logprobs(self) -> dict[str, Any]:
        """The recorded log-probabilities of the tokens of the text."""
        assert self.trajectory is not None
        tokens, values = self.tokens, self.trajectory.completion_logps()[0]
        if self.is_cut:  # up to the token with which the text is there
            sizes = range(len(tokens) + 1)
            size = bisect_left(sizes, len(self.sent), key=lambda size: len(self._decoded(tokens[:size])))
            tokens, values = tokens[:size], values[:size]
        texts = [cast(str, self.tokenizer.decode([token])) for token in tokens]
        if self.asked.chat:
            return {
                "content": [
                    {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
                    for text, value in zip(texts, values, strict=True)
                ],
                "refusal": None,
            }
        offsets = list(accumulate(map(len, texts), initial=0))[:-1]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}


@dataclass
class Answer:
    """The answer to a request, whole or in events."""

    asked: Asked
    model: str
    fingerprint: str  # of the policy and its settings
    choices: list[Choice]

    def __post_init__(self):
        kind = ("chatcmpl" if self.asked.chat else "cmpl") + "-" + secrets.token_hex(12)
        self.head = {
            "id": kind,
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of tokens."""
        written = sum(len(choice.tokens) for choice in self.choices)
        return {
            "prompt_tokens": self.asked.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.asked.prompt_tokens + written,
        }

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        kind = "chat.completion" if self.asked.chat else "text_completion"
        choices = [choice.whole() for choice in self.choices]
        return {**self.head, "object": kind, "choices": choices, "usage": self.usage}

    def event(self, *choices: dict[str, Any], **more: Any) -> bytes:
        """A server-sent event with parts of choices."""
        kind = "chat.completion.chunk" if self.asked.chat else "text_completion"
        return sse({**self.head, "object": kind, "choices": list(choices), **more})


def sse(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def stop_tokens(config: DecodingConfig, stops: tuple[int, ...]) -> frozenset[int]:
    """The tokens that end a response: those of the settings, or else those of the policy."""
    return frozenset(stops if config.stop_token_ids is None else config.stop_token_ids)
