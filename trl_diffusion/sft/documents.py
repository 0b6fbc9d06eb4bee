"""From rows of tokens and labels, as TRL prepares them, to documents: a prompt, and a canvas of which some tokens are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from ..policies.spec import DiffusionSpec
from ..trajectories.trajectory import NEVER, TrajectoryBatch


IGNORED = -100  # label of a token that is not trained


@dataclass
class Documents:
    """
    `R` documents. A document is a prompt and a canvas of whole blocks, as a response is in [`TrajectoryBatch`].

    The canvas begins with the first trained token. The first token of a document belongs to the prompt, because nothing comes
    before it. If the document ends with a stop token, further stop tokens fill the last block, and are trained: a policy that
    denoises whole blocks has to write something there. The rest of the last block of any other document stays masked.

    Attributes:
        prompt_ids (`Tensor` of shape `(R, P)`): tokens of the prompt, left-padded.
        prompt_mask (`Tensor` of shape `(R, P)`): 1 where there is a token of the prompt.
        canvas_ids (`Tensor` of shape `(R, C)`): tokens of the canvas, right-padded.
        canvas_lengths (`Tensor` of shape `(R,)`): length of the canvas.
        written (boolean `Tensor` of shape `(R, C)`): positions of the canvas that have a token.
        trained (boolean `Tensor` of shape `(R, C)`): tokens that are trained. The others are visible.
        numbers (`Tensor` of shape `(R,)`): a number made of the tokens of the document, from which its masks are drawn.
        packs (`Tensor` of shape `(R,)`): the row of the dataset that the document is from. Documents of a row are packed
            into one row of the forward pass.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    canvas_ids: Tensor
    canvas_lengths: Tensor
    written: Tensor
    trained: Tensor
    numbers: Tensor
    packs: Tensor

    @property
    def packed(self) -> bool:
        """Whether some row has several documents."""
        return len(self.packs) > int(self.packs[-1]) + 1

    def trajectories(self) -> TrajectoryBatch:
        """The documents as responses, all of whose tokens were written at once."""
        return TrajectoryBatch(
            prompt_ids=self.prompt_ids,
            prompt_mask=self.prompt_mask,
            canvas_ids=self.canvas_ids,
            steps=torch.where(self.written, 0, NEVER),
            logps=torch.zeros(self.canvas_ids.shape, device=self.canvas_ids.device),
            canvas_lengths=self.canvas_lengths,
            completion_lengths=self.written.sum(1),
        )


@dataclass
class DocumentCollator:
    """
    Makes [`Documents`] of rows with `input_ids`, and perhaps `labels` and `seq_lengths`, as [`~trl.SFTTrainer`] prepares them.

    Args:
        spec ([`DiffusionSpec`]): facts about the policy.
        fill (`int`): the stop token that fills the last block.
    """

    spec: DiffusionSpec
    fill: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [(pack, *one) for pack, example in enumerate(examples) for one in parts_of(example)]
        cut = [_cut(ids, labels, self.spec, self.fill) for _, ids, labels in rows]
        prompt_width = max(len(prompt) for prompt, *_ in cut)
        width = max(length for *_, length in cut)
        shape = (len(cut), width)
        documents = Documents(
            prompt_ids=torch.zeros(len(cut), prompt_width, dtype=torch.long),
            prompt_mask=torch.zeros(len(cut), prompt_width, dtype=torch.long),
            canvas_ids=torch.zeros(shape, dtype=torch.long),
            canvas_lengths=torch.tensor([length for *_, length in cut]),
            written=torch.zeros(shape, dtype=torch.bool),
            trained=torch.zeros(shape, dtype=torch.bool),
            numbers=torch.tensor([_number(ids, labels) for _, ids, labels in rows]),
            packs=torch.tensor([pack for pack, *_ in rows]),
        )
        for row, (prompt, canvas, trained, _) in enumerate(cut):
            documents.prompt_ids[row, prompt_width - len(prompt) :] = torch.tensor(prompt)
            documents.prompt_mask[row, prompt_width - len(prompt) :] = 1
            documents.canvas_ids[row, : len(canvas)] = torch.tensor(canvas)
            documents.written[row, : len(canvas)] = True
            documents.trained[row, : len(canvas)] = torch.tensor(trained)
        return vars(documents)


def parts_of(example: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """The documents of a row of a dataset: their tokens and labels."""
    ids = list(example["input_ids"])
    labels = list(example["labels"] if example.get("labels") is not None else ids)
    start = 0
    for length in example.get("seq_lengths") or [len(ids)]:
        yield ids[start : start + length], labels[start : start + length]
        start += length


def _cut(
    ids: list[int], labels: list[int], spec: DiffusionSpec, fill: int
) -> tuple[list[int], list[int], list[bool], int]:
    """Prompt, canvas, which tokens of the canvas are trained, and the length of the canvas in whole blocks."""
    trained = [label != IGNORED for label in labels]
    begin = next((place for place in range(1, len(ids)) if trained[place]), len(ids))
    prompt, canvas, trained = ids[:begin], ids[begin:], trained[begin:]
    end = spec.canvas_end(len(prompt), len(canvas)) - len(prompt)
    if _ends(canvas, trained, spec):
        missing = end - len(canvas)
        canvas, trained = canvas + missing * [fill], trained + missing * [True]
    return prompt, canvas, trained, end


def _ends(canvas: list[int], trained: list[bool], spec: DiffusionSpec) -> bool:
    """Whether the last stretch of trained tokens, at the end of the canvas, has a stop token."""
    for token, is_trained in zip(reversed(canvas), reversed(trained), strict=True):
        if not is_trained:
            return False
        if token in spec.stop_token_ids:
            return True
    return False


def _number(ids: list[int], labels: list[int]) -> int:
    return xxhash.xxh3_64_intdigest(torch.tensor([ids, labels]).numpy().tobytes()) >> 1
