"""Stored trajectories of decoders that take tokens back: the way there and back, files without them, and files that are refused."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from tests.conftest import MASK, SPECS
from tests.events import batch_of, events_of, random_batch
from tests.offline.conftest import prompt_dataset, run_collect
from trl_diffusion import DecodingConfig, decode, load_trajectories
from trl_diffusion.trajectories.dataset import (
    EVENTS,
    Provenance,
    check_trajectories,
    completions_of,
    from_rows,
    to_rows,
)
from trl_diffusion.trajectories.revisions import Revisions
from trl_diffusion.trajectories.trajectory import TrajectoryBatch


KINDS = {
    name: SPECS[name].replace(block_size=size)
    for name, size in (
        ("block-from-sequence", 4), ("block-from-response", 3), ("shift-autoregressive-first", 4), ("full", 4), ("full-shift", 3),
        ("clean-causal-autoregressive-first", 4),
    )
}  # fmt: skip


def provenance(spec, **decoding) -> Provenance:
    return Provenance("a policy", "a tokenizer", spec, {"temperature": 1.0, "revision": "confidence", **decoding})


def storable(rng: random.Random, spec, rows: int = 4) -> TrajectoryBatch:
    """Random logs in which the completion is visible in the end, as it is of a decoder."""
    parts = []
    while len(parts) < rows:
        batch = random_batch(rng, spec, rows=1)
        visible = int((batch.steps[0] >= 0).long().cumprod(0).sum())
        if visible:
            parts.append(replace(batch, completion_lengths=torch.tensor([rng.randint(1, visible)])))
    return TrajectoryBatch.concatenate(parts)


def as_read(rows, spec, count: int = 1) -> TrajectoryBatch:
    """Rows as they are after they were on a disk."""
    dataset = Dataset.from_list(rows)
    check_trajectories(dataset, spec, MASK + 1, "a tokenizer")
    return from_rows([(row, index) for row in dataset for index in range(count)], spec)


def assert_same(spec, found: TrajectoryBatch, expected: TrajectoryBatch) -> None:
    """The same responses, whatever the padding and the order of the writes that were taken back."""
    assert len(found) == len(expected)
    for row in range(len(found)):
        events = [events_of(spec, batch, row) for batch in (found, expected)]
        assert [replace(event, column=0) for event in events[0]] == [replace(event, column=0) for event in events[1]]
        logps = [
            torch.cat([batch.logps[row], batch.revisions.logps[row]])[[e.column for e in own if e.token is not None]]
            for batch, own in zip((found, expected), events, strict=True)
        ]
        assert torch.equal(*logps)
        prompts = [batch.prompt_ids[row][batch.prompt_mask[row] == 1].tolist() for batch in (found, expected)]
        assert prompts[0] == prompts[1]
        width = int(expected.canvas_lengths[row])
        assert torch.equal(found.canvas_ids[row, :width], expected.canvas_ids[row, :width])
        assert torch.equal(found.logps[row, :width], expected.logps[row, :width])
    for name in ("canvas_lengths", "completion_lengths"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_random_logs_survive_the_way_there_and_back():
    """Also written again: the same rows."""
    taken_back = 0
    for seed in range(12):
        for spec in KINDS.values():
            batch = storable(random.Random(seed), spec)
            rows = to_rows(batch, spec, 1, provenance(spec))
            found = as_read(rows, spec)
            assert_same(spec, found, batch)
            assert to_rows(found, spec, 1, provenance(spec)) == rows
            assert [completions_of(row)[0] for row in rows] == batch.completions()
            assert {row["format_version"] for row in rows} == {2}
            taken_back += int((batch.revisions.steps >= 0).sum())
            for row, number in zip(rows, range(len(batch)), strict=True):
                log = events_of(spec, batch, number)
                assert row["event_steps"] == [[event.step for event in log]]
                assert row["event_positions"] == [[event.position for event in log]]
                assert row["event_tokens"] == [[MASK if event.token is None else event.token for event in log]]
    assert taken_back > 500


def test_without_recorded_log_probabilities(stored):
    spec, rows = stored
    expected = as_read(rows, spec, 2)
    bare = to_rows(expected, spec, 2, provenance(spec), recorded=False)
    assert [row["event_logps"] for row in bare] == [None] * 3
    found = as_read(bare, spec, 2)
    assert not found.logps.any() and not found.revisions.logps.any()
    assert expected.logps.any() and torch.equal(found.revisions.tokens, expected.revisions.tokens)


def test_rows_without_revisions_are_what_they_were():
    """Column by column, as version 1 has always had them; a decoder that may take tokens back, and took none, has the same
    events."""
    spec = KINDS["block-from-sequence"]
    log = [(0, 1, 7), (1, 0, 8), (0, 3, 9), (0, 5, 10), (1, 2, 11), (2, 4, 12)]
    batch = batch_of(random.Random(0), spec, [[21, 22]], [log], [6], [5])
    logps = dict(zip(range(6), batch.logps[0].tolist(), strict=True))
    plain = replace(batch, revisions=None)
    (row,) = to_rows(plain, spec, 1, Provenance("a policy", "a tokenizer", spec, {"temperature": 1.0}))
    expected = {
        "format_version": 1,
        "policy_fingerprint": "a policy",
        "tokenizer_fingerprint": "a tokenizer",
        "spec": '{"attention": "block", "block_origin": "sequence", "block_size": 4, "first_token": "diffusion", '
        '"mask_token_id": 39, "predicts_mask_token": false, "stop_token_ids": [5], "token_shift": false}',
        "decoding": '{"temperature": 1.0}',
        "prompt_ids": [21, 22],
        "canvas_lengths": [6],
        "completion_lengths": [5],
        "event_steps": [[0, 1, 0, 0, 1, 2]],
        "event_positions": [[1, 0, 3, 5, 2, 4]],
        "event_tokens": [[7, 8, 9, 10, 11, 12]],
        "event_logps": [[logps[column] for column in (1, 0, 3, 5, 2, 4)]],
    }
    assert row == expected and list(row) == list(expected)  # in this order
    found = as_read([row], spec)
    assert found.revisions is None
    for name in ("canvas_ids", "steps", "logps", "canvas_lengths", "completion_lengths", "prompt_ids", "prompt_mask"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    (same,) = to_rows(replace(batch, revisions=Revisions.none(1)), spec, 1, provenance(spec))
    assert same["format_version"] == 2 and {name: same[name] for name in EVENTS} == {
        name: row[name] for name in EVENTS
    }
    assert as_read([same], spec).revisions.steps.shape == (1, 0)


def test_the_version_is_that_of_the_responses():
    """Not of what is said about the decoder, which may have a name of its own."""
    spec = KINDS["full"]
    batch = storable(random.Random(0), spec)
    rows = to_rows(batch, spec, 1, Provenance("a policy", "a tokenizer", spec, {"temperature": 1.0}))
    assert {row["format_version"] for row in rows} == {2}
    assert_same(spec, as_read(rows, spec), batch)


# ---------------------------------------------------------------------------------------------------------- refusals

PROMPT = [21, 22, 23, 24]
# Response 1: position 0 is written, erased and written; position 1 is written twice; position 2 is erased; then the rest.
LOG = [(0, 0, 7), (0, 2, 8), (1, 0, None), (1, 1, 9), (2, 2, None), (2, 1, 10), (3, 0, 11), (3, 3, 12), (4, 2, 13)]


@pytest.fixture(params=["block-from-sequence", "full"])
def stored(request):
    """Three rows of two responses each."""
    spec = KINDS[request.param]
    plain = [(0, 0, 7), (1, 1, 8), (2, 2, 9), (3, 3, 10)]
    batch = batch_of(random.Random(0), spec, [PROMPT] * 6, [plain, LOG] * 3, [4] * 6, [4] * 6)
    rows = to_rows(batch, spec, 2, provenance(spec))
    assert_same(spec, as_read(rows, spec, 2), batch)
    return spec, rows


def place_of(row, step: int, position: int) -> int:
    """The event of response 1 at this step and position."""
    return list(zip(row["event_steps"][1], row["event_positions"][1], strict=True)).index((step, position))


def put(column: str, step: int, position: int, value):
    """Changes an event of response 1."""
    return lambda row: row[column][1].__setitem__(place_of(row, step, position), value)


def drop(step: int, position: int):
    def change(row):
        index = place_of(row, step, position)
        for name in EVENTS:
            row[name][1].pop(index)

    return change


def add(step: int, position: int, token: int, logp: float = 0.0, at: int | None = None):
    def change(row):
        index = len(row["event_steps"][1]) if at is None else at
        for name, value in zip(EVENTS, (step, position, token, logp), strict=True):
            row[name][1].insert(index, value)

    return change


POSITIONS = "Row 2, column `event_positions`, response 1: "
BAD = {
    "erased where nothing is": (drop(0, 0), POSITIONS + "erases position 0 at step 1, where nothing is written"),
    "erased at once": (add(0, 3, MASK, at=0), POSITIONS + "erases position 3 at step 0, where nothing is written"),
    "two events of a step": (add(3, 0, 14), POSITIONS + "has two events of position 0 at step 3"),
    "out of order": (add(0, 1, 14), POSITIONS + "has two events of position 1 at step 0, or an earlier one after it"),
    "masked in the end": (drop(4, 2), POSITIONS + "leaves position 2 of the response masked; 4 tokens count"),
    "never written": (drop(3, 3), POSITIONS + "leaves position 3 of the response masked"),
    "outside": (put("event_positions", 3, 3, 4), POSITIONS + "holds a position outside the canvas of 4"),
    "before": (put("event_positions", 3, 3, -1), POSITIONS + "holds a position outside the canvas of 4"),
    "a gap in the steps": (
        put("event_steps", 4, 2, 6), r"Row 2, column `event_steps`, response 1: .*\[0, 1, 2, 3, 6\]; they must count from 0",
    ),
    "a step before the first": (put("event_steps", 0, 0, -1), "Row 2, column `event_steps`, response 1: holds the step -1"),
    "vocabulary": (put("event_tokens", 1, 1, 400), "Row 2, column `event_tokens`, response 1: position 1 holds token 400"),
    "negative token": (put("event_tokens", 1, 1, -3), "Row 2, column `event_tokens`, response 1: position 1 holds token -3"),
    "log-probability of an erasure": (
        put("event_logps", 1, 0, -2.0), "Row 2, column `event_logps`, response 1: holds -2.0 for an erasure",
    ),
    "positive": (put("event_logps", 3, 0, 0.5), "Row 2, column `event_logps`, response 1: holds 0.5"),
    "nan": (put("event_logps", 0, 0, float("nan")), "Row 2, column `event_logps`, response 1: holds nan"),
    "null": (put("event_logps", 1, 0, None), "Row 2, column `event_logps`, response 1"),
    "short": (lambda row: row["event_logps"][1].pop(), "Row 2, column `event_logps`, response 1: holds 8 events"),
    "long": (lambda row: row["event_tokens"][1].append(9), "Row 2, column `event_tokens`, response 1: holds 10 events"),
    "completion": (
        lambda row: row["completion_lengths"].__setitem__(1, 5), "Row 2, column `completion_lengths`, response 1: is 5",
    ),
    "unknown version": (
        lambda row: row.update(format_version=3), "Row 2, column `format_version`: is 3; .* reads 1 and 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_files_are_refused(stored, change, message):
    spec, rows = stored
    rows = copy.deepcopy(rows)
    change(rows[2])
    with pytest.raises(ValueError, match=message):
        as_read(rows, spec, 2)


def test_a_position_outside_the_completion_may_be_masked_in_the_end(stored):
    spec, rows = stored
    rows = copy.deepcopy(rows)
    add(5, 3, MASK)(rows[2])
    with pytest.raises(ValueError, match="leaves position 3 of the response masked"):
        as_read(rows, spec, 2)
    rows[2]["completion_lengths"][1] = 3
    batch = as_read(rows, spec, 2)
    assert batch.canvas_ids[5, 3] == MASK and batch.steps[5, 3] == -1 and batch.logps[5, 3] == 0


def test_random_damage_is_noticed_or_harmless():
    """Whatever happens to the numbers of an event: a file that is read can be written again and is the same log."""
    noticed = 0
    for seed in range(60):
        rng = random.Random(seed)
        spec = KINDS[rng.choice(sorted(KINDS))]
        rows = to_rows(storable(rng, spec, rows=1), spec, 1, provenance(spec))
        row = rng.choice(rows)
        column = rng.choice(EVENTS[:3])
        index = rng.randrange(len(row[column][0]))
        row[column][0][index] += rng.choice([-3, -1, 1, 2, 30])
        try:
            batch = as_read(rows, spec)
        except ValueError as error:
            assert "column `event_" in str(error) and ", response 0: " in str(error)
            noticed += 1
            continue
        for again, own in zip(to_rows(batch, spec, 1, provenance(spec)), rows, strict=True):
            events = [sorted(zip(*(one[name][0] for name in EVENTS[:3]), strict=True)) for one in (again, own)]
            assert events[0] == events[1]
    assert 20 < noticed < 60


def test_an_autoregressive_token_is_written_once():
    """It is scored in the finished block before it, which is its state only if it is the first one of its block."""
    spec = KINDS["shift-autoregressive-first"]
    log = [(0, 0, 7), (1, 1, 8), (1, 2, 9), (1, 3, 10), (2, 0, None), (3, 0, 11)]
    batch = batch_of(random.Random(0), spec, [PROMPT], [log], [4], [4])
    rows = to_rows(batch, spec, 1, provenance(spec))
    with pytest.raises(
        ValueError, match="Row 0, column `event_positions`, response 0: takes back position 0, .*autoregressive"
    ):
        as_read(rows, spec)


def test_a_file_that_says_it_takes_nothing_back(stored):
    spec, rows = stored
    with pytest.raises(ValueError, match="Row 0, column `event_tokens`, response 1: position 0 holds the mask token"):
        as_read([{**row, "format_version": 1} for row in rows], spec, 2)


def test_both_versions_in_one_dataset(stored):
    """The steps of the one are counted over the whole response, and every write counts; of the other they are not."""
    spec, rows = stored
    rows = copy.deepcopy(rows)
    rows[1]["format_version"] = 1
    for name in EVENTS:
        rows[1][name][1] = rows[1][name][0]
    with pytest.raises(ValueError, match="Row 1, column `format_version`: is 1, but row 0 has 2"):
        as_read(rows, spec, 2)


# ---------------------------------------------------------------------------------------------------------- collect


def test_a_collection(start, tokenizer, char_spec, tmp_path):
    """Rows are the responses that decoding gives for their seeds, with all that was taken back."""
    from transformers import AutoModelForCausalLM

    from trl_diffusion.seeds import derive_seed

    decoding = DecodingConfig(14, 1.0, tokens_per_step=2, revision="confidence", revision_threshold=0.3)
    options = {"decoding": decoding, "num_responses": 2, "dataset": prompt_dataset(4)}
    path = run_collect(start, tmp_path / "run", tokenizer, **options)
    dataset = load_trajectories(path)
    check_trajectories(dataset, char_spec, len(tokenizer))
    policy, taken_back = AutoModelForCausalLM.from_pretrained(start), 0
    for row in dataset:
        assert row["format_version"] == 2 and json.loads(row["decoding"])["revision"] == "confidence"
        seeds = [derive_seed(5, row["row"], response) for response in range(2)]
        expected = decode(policy, [row["prompt_ids"]] * 2, decoding, char_spec, seeds)
        found = from_rows([(row, response) for response in range(2)], char_spec)
        for index in range(2):
            events = [events_of(char_spec, batch, index) for batch in (found, expected)]
            assert [replace(e, column=0) for e in events[0]] == [replace(e, column=0) for e in events[1]]
            taken_back += sum(event.token is None for event in events[0])
        assert completions_of(row) == expected.completions()
    assert taken_back
    with pytest.raises(ValueError, match="decoding"):
        run_collect(start, path, tokenizer, **{**options, "decoding": replace(decoding, revision=None)})
