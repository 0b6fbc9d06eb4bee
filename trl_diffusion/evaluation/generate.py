"""Answers of a policy, and what they cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields

import torch
from tqdm.auto import tqdm

from ..decoding.config import DecodingConfig
from ..decoding.decode import check_prompts, decode
from ..decoding.loop import DenoisingLoop
from ..fields import check_at_least
from ..policies.forward import NonFiniteLogits, unwrap
from ..policies.policy import Policy


_CHUNK = 16  # how many times the answers that are decoded at once are handed over at once


@dataclass
class Usage:
    """
    What answers cost.

    Attributes:
        answers (`int`): answers given.
        tokens (`int`): their tokens, up to and including the stop token.
        forwards (`int`): forward passes, each counted once for every answer that was in it.
        seconds (`float`): time spent on decoding.
    """

    answers: int = 0
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Tokens of an answer for each forward pass that it took part in."""
        return self.tokens / self.forwards if self.forwards else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers for each second of decoding."""
        return self.tokens / self.seconds if self.seconds else float("nan")

    def add(self, other: Usage) -> None:
        """Adds what other answers cost."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def generate(
    policy: Policy,
    prompts: list[list[int]],
    decoding: DecodingConfig,
    seeds: list[int] | None = None,
    batch_size: int = 32,
    progress: str | None = None,
) -> tuple[list[list[int]], Usage]:
    """
    Answers prompts, the longest first. An answer depends on its own prompt and seed alone.

    Args:
        policy ([`Policy`]): who answers.
        prompts (`list[list[int]]`): token ids, unpadded.
        decoding ([`DecodingConfig`]): settings of the decoder.
        seeds (`list[int]`, *optional*): one for each prompt; needed where answers are random.
        batch_size (`int`, *optional*, defaults to `32`): answers at a time.
        progress (`str`, *optional*): label of a progress bar.

    Returns:
        `tuple[list[list[int]], Usage]`: token ids of each answer, in the order of the prompts, and what they cost.

    Raises:
        ValueError: if the batch size is not positive, or a prompt cannot be answered (see [`decode`]).
        NonFiniteLogits: a `FloatingPointError`, if the policy's logits are NaN or infinite.
    """
    check_at_least("batch_size", batch_size)
    # In the order that they have here, so that an error names the right one.
    check_prompts(prompts, policy.spec, unwrap(policy.model).config, decoding.max_new_tokens)
    # The longest first: what does not fit into memory shows at once.
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    completions: list[list[int]] = [[] for _ in prompts]
    usage = Usage()

    def count(loop: DenoisingLoop) -> None:
        usage.forwards += sum(lane is not None for lane in loop.lanes)

    with tqdm(total=len(prompts), desc=progress, disable=progress is None, unit="answer") as bar:
        for begin in range(0, len(order), _CHUNK * batch_size):
            rows = order[begin : begin + _CHUNK * batch_size]
            _synchronize()
            start = time.perf_counter()
            try:
                batch = decode(
                    policy.model,
                    [prompts[row] for row in rows],
                    decoding,
                    policy.spec,
                    None if seeds is None else [seeds[row] for row in rows],
                    batch_size=batch_size,
                    on_step=count,
                )
            except NonFiniteLogits as error:  # under the caller's number
                raise NonFiniteLogits(rows[error.row], error.reason) from error
            _synchronize()
            usage.seconds += time.perf_counter() - start
            for row, completion in zip(rows, batch.completions(), strict=True):
                completions[row] = completion
                usage.answers += 1
                usage.tokens += len(completion)
            bar.update(len(rows))
    return completions, usage


def cut(text: str, stops: list[str] | tuple[str, ...]) -> str:
    """`text` up to the first of the `stops` in it."""
    ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
