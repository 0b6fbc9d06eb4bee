"""From rows of tokens and labels, as TRL prepares them, to documents: a prompt, and a canvas that is trained."""

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

    Every stretch of trained tokens in a row, such as a turn of the assistant, is the canvas of a document of its own. What comes
    before it is the prompt. What comes after it is not there, because a policy that writes the canvas does not see it.

    If the canvas has a stop token, further stop tokens fill its last block, and are trained: a policy that denoises whole blocks has
    to write something there. The rest of the last block of any other document stays masked.

    Attributes:
        prompt_ids (`Tensor` of shape `(R, P)`): tokens of the prompt, left-padded.
        prompt_mask (`Tensor` of shape `(R, P)`): 1 where there is a token of the prompt.
        canvas_ids (`Tensor` of shape `(R, C)`): tokens of the canvas, right-padded.
        canvas_lengths (`Tensor` of shape `(R,)`): length of the canvas, in whole blocks.
        trained (boolean `Tensor` of shape `(R, C)`): positions of the canvas that have a token, which is trained.
        numbers (`Tensor` of shape `(R,)`): a number made of the tokens of the document, from which its masks are drawn.
        packs (`Tensor` of shape `(R,)`): the row of the dataset that the document is from. Documents of a row share a row of
            the forward pass.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    canvas_ids: Tensor
    canvas_lengths: Tensor
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
            steps=torch.where(self.trained, 0, NEVER),
            logps=torch.zeros(self.canvas_ids.shape, device=self.canvas_ids.device),
            canvas_lengths=self.canvas_lengths,
            completion_lengths=self.trained.sum(1),
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
        found = [(pack, *one) for pack, example in enumerate(examples) for one in documents_of(example)]
        ends = [self.spec.canvas_end(len(prompt), len(canvas)) - len(prompt) for _, prompt, canvas in found]
        shape, prompt_width = (len(found), max(ends)), max(len(prompt) for _, prompt, _ in found)
        documents = Documents(
            prompt_ids=torch.zeros(len(found), prompt_width, dtype=torch.long),
            prompt_mask=torch.zeros(len(found), prompt_width, dtype=torch.long),
            canvas_ids=torch.zeros(shape, dtype=torch.long),
            canvas_lengths=torch.tensor(ends),
            trained=torch.zeros(shape, dtype=torch.bool),
            numbers=torch.tensor([_number(prompt, canvas) for _, prompt, canvas in found]),
            packs=torch.tensor([pack for pack, *_ in found]),
        )
        for row, ((_, prompt, canvas), end) in enumerate(zip(found, ends, strict=True)):
            if not set(canvas).isdisjoint(self.spec.stop_token_ids):
                canvas = canvas + (end - len(canvas)) * [self.fill]
            documents.prompt_ids[row, prompt_width - len(prompt) :] = torch.tensor(prompt)
            documents.prompt_mask[row, prompt_width - len(prompt) :] = 1
            documents.canvas_ids[row, : len(canvas)] = torch.tensor(canvas, dtype=torch.long)
            documents.trained[row, : len(canvas)] = True
        return vars(documents)


def documents_of(example: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt and canvas of each document of a row of a dataset, at least one. The first token of a sequence is not trained, because
    nothing comes before it; of a sequence without a trained token, the canvas is empty."""
    whole = list(example["input_ids"])
    labels = list(example["labels"] if example.get("labels") is not None else whole)
    start = 0
    for length in example.get("seq_lengths") or [len(whole)]:
        ids = whole[start : start + length]
        trained = [place > 0 and label != IGNORED for place, label in enumerate(labels[start : start + length])]
        edges = [place for place in range(1, length) if trained[place] != trained[place - 1]] + [length]
        for begin, end in zip(edges[::2], edges[1::2], strict=False):
            yield ids[:begin], ids[begin:end]
        if len(edges) == 1:
            yield ids, []
        start += length


def _number(prompt: list[int], canvas: list[int]) -> int:
    content = torch.tensor([len(prompt), *prompt, *canvas]).numpy().tobytes()
    return xxhash.xxh3_64_intdigest(content) >> 1
