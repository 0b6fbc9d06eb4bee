"""Rows of tokens and labels become prompt, canvas and trained tokens."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from tests.conftest import MASK, STOP
from trl_diffusion import DiffusionSpec
from trl_diffusion.sft.documents import IGNORED, DocumentCollator, Documents
from trl_diffusion.sft.setup import rows_of


BLOCKS = DiffusionSpec(mask_token_id=MASK, block_size=4, stop_token_ids=(STOP, 4))
FULL = BLOCKS.replace(attention="full", block_origin="response")
_ = IGNORED

# name: spec, tokens, labels; prompt and canvas of each document, with `None` for what has no token and stays masked
CASES = {
    "a stop token fills the block": (
        BLOCKS, [11, 12, 13, 14, 15, STOP], [_, _, _, 14, 15, STOP], [([11, 12, 13], [14, 15, STOP, STOP, STOP])],
    ),
    "nothing fills the block of a document that was cut": (
        BLOCKS, [11, 12, 13, 14, 15], [_, _, 13, 14, 15], [([11, 12], [13, 14, 15, None, None, None])],
    ),
    "the first token is never trained": (BLOCKS, [11, 12, STOP], [11, 12, STOP], [([11], [12, STOP, STOP])]),
    "turns are documents of their own": (
        BLOCKS, [11, 12, STOP, 13, 14, 4], [_, 12, STOP, _, 14, 4],
        [([11], [12, STOP, STOP]), ([11, 12, STOP, 13], [14, 4, STOP, STOP])],
    ),
    "of a turn without a stop token the rest stays masked": (
        BLOCKS, [11, 12, STOP, 13, 14], [_, 12, STOP, _, 14],
        [([11], [12, STOP, STOP]), ([11, 12, STOP, 13], [14, None, None, None])],
    ),
    "what the template puts behind the stop token is not seen": (
        BLOCKS, [11, 12, STOP, 13], [_, 12, STOP, _], [([11], [12, STOP, STOP])],
    ),
    "of a conversation that was cut after an earlier turn the rest stays masked": (
        BLOCKS, [11, 12, STOP, 13, 14, 15], [_, 12, STOP, 13, 14, 15], [([11], [12, STOP, 13, 14, 15, None, None])],
    ),
    "a trained newline behind the stop token": (BLOCKS, [11, 12, STOP, 13], [_, 12, STOP, 13], [([11], [12, STOP, 13])]),
    "a document without a trained token": (BLOCKS, [11, 12, 13], [_, _, _], [([11, 12, 13], [None])]),
    "full attention counts blocks from the canvas": (
        FULL, [11, 12, 13, 14, STOP], [_, _, _, 14, STOP], [([11, 12, 13], [14, STOP, STOP, STOP])],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rows_are_cut_into_prompts_and_canvases(name):
    spec, ids, labels, expected = CASES[name]
    found = Documents(**DocumentCollator(spec, STOP)([{"input_ids": ids, "labels": labels}]))
    assert len(found.packs) == len(expected) and not found.packs.any()
    for row, (prompt, canvas) in enumerate(expected):
        assert found.prompt_ids[row][found.prompt_mask[row] == 1].tolist() == prompt
        assert found.canvas_lengths[row] == len(canvas)
        ids = found.canvas_ids[row].masked_fill(~found.trained[row], -1).tolist()
        assert ids[: len(canvas)] == [-1 if token is None else token for token in canvas]
        assert not found.trained[row, len(canvas) :].any()


def test_documents_of_a_packed_row_are_taken_apart():
    """The same documents, alone and in rows with `seq_lengths`, differ by their row only."""
    one = {"input_ids": [11, 12, 13, STOP], "labels": [_, 12, 13, STOP]}
    two = {"input_ids": [14, 15], "labels": [_, 15]}
    three = {"input_ids": [16, 17, 18], "labels": [_, _, 18]}
    joined = {"input_ids": one["input_ids"] + two["input_ids"], "labels": one["labels"] + two["labels"]}
    collate = DocumentCollator(BLOCKS, STOP)
    apart = collate([one, two, three])
    packed = collate([{**joined, "seq_lengths": [4, 2]}, {**three, "seq_lengths": [3]}])
    assert packed.pop("packs").tolist() == [0, 0, 1] and apart.pop("packs").tolist() == [0, 1, 2]
    for name, values in apart.items():
        assert torch.equal(values, packed[name]), name


def test_the_number_of_a_document_depends_on_its_tokens_only():
    rows = [
        {"input_ids": [11, 12, 13], "labels": [_, 12, 13]},
        {"input_ids": [11, 12, 14], "labels": [_, 12, 14]},
        {"input_ids": [11, 12, 13], "labels": [_, _, 13]},
    ]
    collate = DocumentCollator(BLOCKS, STOP)
    numbers = collate(rows)["numbers"].tolist()
    assert len(set(numbers)) == 3
    assert collate([{"input_ids": list(range(20, 39))}, *reversed(rows)])["numbers"].tolist()[1:] == numbers[::-1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": [11, 12], "labels": [_]}, "2 `input_ids` and 1 `labels`"),
        ({"input_ids": [11, 12, 13], "labels": [12, 13, _]}, "token 11 and label 12 at position 0"),
        ({"input_ids": [11, 12, 13], "seq_lengths": [2]}, "3 `input_ids`, but its `seq_lengths` add up to 2"),
        ({"text": "a"}, r"no `input_ids`, but \['text'\]"),
        ({"input_ids": [11, MASK, 13]}, rf"holds the mask token \({MASK}\) at position 1"),
        ({"input_ids": [11, 77, 13]}, "holds token 77, but the model's vocabulary has 60 tokens"),
        (
            {"input_ids": list(range(10, 23))},
            "has 13 tokens, in whole blocks 16, more than the policy's context of 14",
        ),
    ],
)
def test_rows_that_cannot_be_trained_on(row, said):
    """The collator sees rows of streams, too, which nothing has checked before."""
    with pytest.raises(ValueError, match=said):
        DocumentCollator(BLOCKS, STOP, vocab_size=60, context=14)([row])


def test_stop_tokens_fill_a_canvas_of_the_length_that_is_asked_for():
    """A document that was cut, and one that is longer, have the blocks that their tokens need."""
    rows = [
        {"input_ids": [11, 12, STOP], "labels": [_, 12, STOP]},
        {"input_ids": [11, 12, 13], "labels": [_, 12, 13]},
        {"input_ids": [11, *[12] * 13, STOP], "labels": [_, *[12] * 13, STOP]},
    ]
    found = Documents(**DocumentCollator(FULL, STOP, least=10)(rows))
    assert found.canvas_lengths.tolist() == [12, 4, 16]
    assert found.trained.sum(1).tolist() == [12, 2, 16]
    assert found.canvas_ids[0, :12].tolist() == [12, *[STOP] * 11]


def test_rows_of_a_dataset_are_read_as_they_are():
    """A thousand at a time: also shuffled rows, empty lists, missing columns and lists that are not there."""
    rows = [{"input_ids": list(range(n % 7)), "labels": list(range(n % 7)) if n % 3 else None} for n in range(1100)]
    for dataset in (Dataset.from_list(rows), Dataset.from_list(rows).shuffle(seed=0).select(range(1050))):
        for one in (dataset, dataset.remove_columns("labels"), dataset.with_format("torch", columns=["input_ids"])):
            found = [{k: v if v is None else list(v) for k, v in row.items()} for row in rows_of(one)]
            expected = [{k: v if v is None else list(v) for k, v in row.items()} for row in one]
            assert found == expected
