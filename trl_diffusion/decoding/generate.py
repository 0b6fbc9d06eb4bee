"""Text in, text out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from shutil import get_terminal_size
from typing import Any, TextIO, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..policies.forward import unwrap
from ..policies.loading import resolve_spec, with_absent_tokens
from ..policies.spec import DiffusionSpec
from ..seeds import derive_seed
from ..trajectories.trajectory import TrajectoryBatch
from ..utils import printable
from .config import DecodingConfig
from .decode import decode
from .loop import DenoisingLoop


@dataclass
class Generation:
    """
    What [`generate`] returns.

    Attributes:
        texts (`list[str]`): the response to each prompt, without special tokens.
        trajectories ([`TrajectoryBatch`]): how each was denoised.
    """

    texts: list[str]
    trajectories: TrajectoryBatch


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | list,
    config: DecodingConfig | None = None,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    streamer: bool | Callable[[DenoisingLoop], None] = False,
    spec: DiffusionSpec | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    **settings: Any,
) -> Generation:
    """
    Answers prompts.

    ```python
    answers = generate(model, tokenizer, ["sudoku 3100243010040003"], max_new_tokens=17, tokens_per_step=2)
    answers.texts
    ```

    Args:
        model (`nn.Module`): the policy. It is put into evaluation mode for the time being.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompts (`str` or `list`): a prompt or several: strings, or conversations (lists of messages). If the last message is
            an assistant's, the policy goes on with it.
        config ([`DecodingConfig`], *optional*): settings. Or give them one by one as `settings`.
        seed (`int`, *optional*, defaults to `0`): source of randomness if there is a temperature. Each prompt has a stream
            of its own, made from it and the prompt's place.
        batch_size (`int`, *optional*): most responses decoded at once. All of them if `None`.
        streamer (`bool` or callable, *optional*, defaults to `False`): `True` shows the canvas being denoised in the terminal
            (see [`TerminalStreamer`]); a function is called after each step with the [`DenoisingLoop`].
        spec ([`DiffusionSpec`], *optional*): facts about the policy. Defaults to those of the model's config. What
            is left open (mask token, tokens that do not exist) comes from the tokenizer.
        chat_template_kwargs (`dict`, *optional*): variables of the chat template, such as `{"enable_thinking": False}`.
        settings: fields of [`DecodingConfig`], instead of `config`.

    Returns:
        [`Generation`]

    Raises:
        ValueError: if both `config` and `settings` are given, and for what [`decode`] refuses.
    """
    from ..policies.prompts import read_chat_template_kwargs, tokenize_prompts  # here, since it brings TRL along

    if config is not None and settings:
        raise ValueError(f"Give `config` or single settings, not both; got `config` and {sorted(settings)}.")
    config = config or DecodingConfig(**settings)
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], dict)):
        prompts = [prompts]
    if not prompts:
        raise ValueError("There is no prompt to answer.")
    model_config = unwrap(model).config
    spec = with_absent_tokens(spec, model_config, tokenizer) if spec else resolve_spec(model_config, None, tokenizer)
    prompt_ids = tokenize_prompts(tokenizer, list(prompts), **read_chat_template_kwargs(chat_template_kwargs))
    seeds = [derive_seed(seed, row) for row in range(len(prompts))]
    was_training = model.training
    model.eval()
    on_step = TerminalStreamer(tokenizer) if streamer is True else streamer or None
    try:
        batch = decode(model, prompt_ids, config, spec, seeds, batch_size, on_step=on_step)
    finally:
        model.train(was_training)
        if isinstance(on_step, TerminalStreamer):
            on_step.end()
    return Generation(tokenizer.batch_decode(batch.completions(), skip_special_tokens=True), batch)


class TerminalStreamer:
    """
    Shows responses while they are denoised: a line for each that is in work, `░` for what is masked. On a terminal the
    lines are drawn over; elsewhere each step adds its lines. Control characters that a policy writes are spelled out.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): turns tokens into text.
        file (`TextIO`, *optional*): where to write. Standard output if `None`.
        max_rows (`int`, *optional*, defaults to `8`): most responses shown, the first ones.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, file: TextIO | None = None, max_rows: int = 8):
        self.tokenizer, self.file, self.max_rows = tokenizer, file or sys.stdout, max_rows
        self._lines = 0

    def __call__(self, loop: DenoisingLoop) -> None:
        shown = loop.active_lanes()[: self.max_rows]
        lines = "\n".join(f"{lane.row:>3} {self._text(loop, lane.row)}" for lane in shown).split("\n")
        if self.file.isatty():
            columns = get_terminal_size().columns
            lines = [line[:columns] for line in lines]  # a wrapped line would be two to go back over
            if self._lines:
                self.file.write(f"\x1b[{self._lines}F\x1b[J")
        self._lines = len(lines)
        self.file.write("\n".join(lines) + "\n")
        self.file.flush()

    def end(self) -> None:
        """The next response is drawn below."""
        self._lines = 0

    def _text(self, loop: DenoisingLoop, row: int) -> str:
        """The canvas of a response, up to the end of its active block."""
        parts: list[str] = []
        run: list[int] = []
        for token, masked in loop.canvas(row):
            if masked:
                parts += [self._spell(run), "░"]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self._spell(run)])

    def _spell(self, run: list[int]) -> str:
        return printable(cast(str, self.tokenizer.decode(run))) if run else ""
