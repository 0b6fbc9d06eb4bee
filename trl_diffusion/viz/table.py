"""A table of responses: a row for each, with what was written, how surely, in which order and in how many steps."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..policies.spec import DiffusionSpec
from ..trajectories.revisions import NEVER
from ..trajectories.trajectory import TrajectoryBatch, response_blocks, steps_of_responses


def trajectory_rows(batch: TrajectoryBatch, spec: DiffusionSpec, tokenizer) -> list[dict[str, Any]]:
    """
    What there is to read about each response. Log-probabilities are those that were recorded while decoding, in nats.

    Args:
        batch ([`TrajectoryBatch`]): the responses.
        spec ([`DiffusionSpec`]): facts about the policy that made them.
        tokenizer (`PreTrainedTokenizerBase`): turns tokens into text.

    Returns:
        `list[dict[str, Any]]`: for each response:

            - `prompt`, `response`: the texts. That of the prompt has the tokens of the chat template, as the policy sees it.
            - `tokens`, `ended`: number of tokens of the completion, and whether it ends with a stop token.
            - `passes`, `tokens_per_pass`: denoising steps, each of which is a forward pass, and tokens divided by them.
            - `mean_logp`, `min_logp`: mean and least log-probability of its tokens. NaN if none was recorded.
            - `taken_back`: number of writes that were taken back.
            - `order`: the step in which each token was written, counted from 0 in its block, as in `0 2 1 | 0 1 1` for two blocks of
              three tokens. A revising decoder with full attention counts over the whole response.
    """
    width = batch.canvas_ids.shape[1]
    blocks = response_blocks(spec, batch.prompt_lengths, width).tolist()
    passes = steps_of_responses(spec, batch).tolist()
    taken_back = [0] * len(batch)
    if batch.revisions is not None:
        taken_back = (batch.revisions.steps != NEVER).sum(1).tolist()
    logps = batch.logps.masked_fill(batch.steps == NEVER, torch.nan)
    rows: list[dict[str, Any]] = []
    for row, ids in enumerate(batch.completions()):
        known = [value for value in logps[row, : len(ids)].tolist() if not math.isnan(value)]
        rows.append(
            {
                "prompt": tokenizer.decode(batch.prompt_ids[row][batch.prompt_mask[row].bool()]),
                "response": tokenizer.decode(ids, skip_special_tokens=True),
                "tokens": len(ids),
                "ended": bool(ids) and ids[-1] in spec.stop_token_ids,
                "passes": passes[row],
                "tokens_per_pass": len(ids) / passes[row] if passes[row] else 0.0,
                "mean_logp": sum(known) / len(known) if known else math.nan,
                "min_logp": min(known, default=math.nan),
                "taken_back": taken_back[row],
                "order": order_of(batch.steps[row, : len(ids)].tolist(), blocks[row]),
            }
        )
    return rows


def order_of(steps: list[int], blocks: list[int]) -> str:
    """
    The steps of some tokens as text, with a bar between blocks.

    Args:
        steps (`list[int]`): step of each token; -1, shown as a dot, if it was never written.
        blocks (`list[int]`): block of each token. There may be more.
    """
    words: list[str] = []
    for place, step in enumerate(steps):
        if place and blocks[place] != blocks[place - 1]:
            words.append("|")
        words.append("." if step == NEVER else str(step))
    return " ".join(words)
