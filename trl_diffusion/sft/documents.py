"""From rows of tokens and labels, as TRL prepares them, to documents: a prompt, and a canvas that is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..policies.spec import DiffusionSpec, impossible_token
from ..trajectories.trajectory import NEVER, TrajectoryBatch


IGNORED = -100  # label of a token that is not trained


@dataclass
class Documents:
    """
    `R` documents. A document is a prompt and a canvas of whole blocks, as a response is in [`TrajectoryBatch`].

    Every run of trained tokens in a row, such as a turn of the assistant, is the canvas of a document of its own. The tokens before
    it are the prompt. The tokens after it are left out, because a policy that writes the canvas does not see them.

    If the canvas ends with a stop token, further stop tokens fill its last block, and are trained: a policy that denoises whole
    blocks has to write something there. One more token may follow the stop token (a newline of the chat template). A document
    whose canvas ends otherwise was cut off. The rest of its last block stays masked.

    Attributes:
        prompt_ids (`Tensor` of shape `(R, P)`): tokens of the prompt, left-padded.
        prompt_mask (`Tensor` of shape `(R, P)`): 1 where there is a token of the prompt.
        canvas_ids (`Tensor` of shape `(R, C)`): tokens of the canvas, right-padded.
        canvas_lengths (`Tensor` of shape `(R,)`): length of the canvas, in whole blocks.
        trained (boolean `Tensor` of shape `(R, C)`): positions of the canvas that have a token, which is trained.
        numbers (`Tensor` of shape `(R,)`): a hash of the tokens of the document, which seeds its masks.
        packs (`Tensor` of shape `(R,)`): number, in the batch, of the row that the document is from, from 0. Documents of a row
            share a row of the forward pass.
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
    Makes the attributes of [`Documents`], as a dictionary, from rows with `input_ids` and perhaps `labels` and `seq_lengths`, as
    [`~trl.SFTTrainer`] prepares them.

    Args:
        spec ([`DiffusionSpec`]): facts about the policy.
        fill (`int`): the stop token that fills the last block.
        least (`int`, *optional*, defaults to `0`): smallest number of canvas tokens, before it is rounded up to whole blocks, of
            a document that ends with a stop token.
        vocab_size (`int`, *optional*): number of tokens that the model has.
        context (`int`, *optional*): number of positions that the model has.

    Raises:
        ValueError: for a row that cannot be trained on. Rows of a stream, and of a dataset that is passed to `evaluate`, are
            only checked here.
    """

    spec: DiffusionSpec
    fill: int
    least: int = 0
    vocab_size: int | None = None
    context: int | None = None

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        found = [(pack, *one) for pack, example in enumerate(examples) for one in documents_of(example)]
        for _, prompt, canvas in found:
            self.check(prompt, canvas)
        ends = [self.canvas_length(prompt, canvas) for _, prompt, canvas in found]
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
            documents.prompt_ids[row, prompt_width - len(prompt) :] = torch.tensor(prompt)
            documents.prompt_mask[row, prompt_width - len(prompt) :] = 1
            end = end if self.has_ended(canvas) else len(canvas)
            documents.canvas_ids[row, : len(canvas)] = torch.tensor(canvas)
            documents.canvas_ids[row, len(canvas) : end] = self.fill
            documents.trained[row, :end] = True
        return vars(documents)

    def has_ended(self, canvas: np.ndarray) -> bool:
        """Whether a canvas ends with a stop token, perhaps with one more token after it."""
        return not set(canvas[-2:].tolist()).isdisjoint(self.spec.stop_token_ids)

    def canvas_length(self, prompt: np.ndarray, canvas: np.ndarray) -> int:
        """Length of the canvas in whole blocks."""
        size = max(len(canvas), self.least) if self.has_ended(canvas) else len(canvas)
        return self.spec.canvas_end(len(prompt), size) - len(prompt)

    def check(self, prompt: np.ndarray, canvas: np.ndarray, name: str = "A document") -> None:
        """Raises a `ValueError` for a document with a token that no document can have, or that is longer than the context."""
        found = impossible_token(np.concatenate([prompt, canvas]), self.spec, self.vocab_size)
        if found is not None:
            raise ValueError(f"{name} holds {found[1]} at position {found[0]}. Remove it from the data.")
        end = len(prompt) + self.canvas_length(prompt, canvas)
        if self.context is not None and end > self.context:
            raise ValueError(
                f"{name} has {len(prompt) + len(canvas)} tokens, in whole blocks {end}, more than the policy's context of "
                f"{self.context}. Lower `max_length` or `canvas_length`."
            )


def documents_of(example: dict[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """
    Prompt and canvas of each document of a row of a dataset. The first token of a sequence is not trained, because nothing comes
    before it. A sequence without a trained token gives one document with an empty canvas.

    Raises:
        ValueError: if there are no tokens, the labels are not those of the tokens, or the lengths of packed sequences do not add up.
    """
    if example.get("input_ids") is None:
        raise ValueError(f"A row has no `input_ids`, but {sorted(example)}. Leave out `skip_prepare_dataset`.")
    whole = np.asarray(example["input_ids"], dtype=np.int64)
    labels = whole if example.get("labels") is None else np.asarray(example["labels"], dtype=np.int64)
    if len(labels) != len(whole):
        raise ValueError(f"A row has {len(whole)} `input_ids` and {len(labels)} `labels`. There must be equally many.")
    mismatch = (labels != IGNORED) & (labels != whole)
    if mismatch.any():
        place = int(mismatch.argmax())
        raise ValueError(
            f"A row has token {whole[place]} and label {labels[place]} at position {place}. A masked token is predicted at its own "
            f"position, so a label is either the token or {IGNORED}, without a shift."
        )
    lengths = example.get("seq_lengths")
    lengths = [len(whole)] if lengths is None or len(lengths) == 0 else [int(length) for length in lengths]
    if sum(lengths) != len(whole):
        raise ValueError(f"A row has {len(whole)} `input_ids`, but its `seq_lengths` add up to {sum(lengths)}.")
    start = 0
    for length in lengths:
        ids, trained = whole[start : start + length], labels[start : start + length] != IGNORED
        trained[:1] = False
        edges = [*(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), length]
        for begin, end in zip(edges[::2], edges[1::2], strict=False):
            yield ids[:begin], ids[begin:end]
        if len(edges) == 1:
            yield ids, ids[:0]
        start += length


def _number(prompt: np.ndarray, canvas: np.ndarray) -> int:
    content = np.concatenate([[len(prompt)], prompt, canvas]).astype(np.int64).tobytes()
    return xxhash.xxh3_64_intdigest(content) >> 1
