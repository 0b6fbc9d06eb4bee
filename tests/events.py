"""
Event logs of decoders that take tokens back, in plain loops: what a policy saw before each write, and what it said. Independent
of the package. And random logs, which no decoder would write.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference import block_of, read_at, who_sees_whom
from trl_diffusion.policies.spec import DiffusionSpec
from trl_diffusion.trajectories.revisions import Revisions
from trl_diffusion.trajectories.trajectory import TrajectoryBatch


@dataclass(frozen=True)
class Event:
    """
    A write, or an erasure (without a token). `region` is the block, or 0 with full attention. `column` is that of the write in
    `(R, E)`, -1 for an erasure.
    """

    region: int
    step: int
    position: int
    token: int | None = None
    column: int = -1


def region_of(spec: DiffusionSpec, prompt_length: int, position: int) -> int:
    return block_of(spec, prompt_length, position) if spec.attention == "block" else 0


def is_autoregressive(spec: DiffusionSpec, prompt_length: int, position: int) -> bool:
    """Whether a canvas position is the autoregressive first one of its block."""
    origin = 0 if spec.block_origin == "sequence" else prompt_length
    return spec.first_token == "autoregressive" and (prompt_length + position - origin) % spec.block_size == 0


def prompt_of(batch: TrajectoryBatch, row: int) -> list[int]:
    return batch.prompt_ids[row][batch.prompt_mask[row] == 1].tolist()


def events_of(spec: DiffusionSpec, batch: TrajectoryBatch, row: int) -> list[Event]:
    """The log of a response, in the order in which things happened."""
    length, width = len(prompt_of(batch, row)), batch.canvas_ids.shape[1]
    found = [
        Event(region_of(spec, length, column), step, column, int(batch.canvas_ids[row, column]), column)
        for column, step in enumerate(batch.steps[row].tolist())
        if step >= 0
    ]
    ends = []
    if batch.revisions is not None:
        lists = [getattr(batch.revisions, name)[row].tolist() for name in ("positions", "tokens", "steps", "until")]
        for index, (position, token, step, until) in enumerate(zip(*lists, strict=True)):
            if step >= 0:
                found.append(Event(region_of(spec, length, position), step, position, token, width + index))
                ends.append((position, until))
    written = {(event.position, event.step) for event in found}
    found += [Event(region_of(spec, length, p), until, p) for p, until in ends if (p, until) not in written]
    return sorted(found, key=lambda event: (event.region, event.step, event.position))


def moments(events: list[Event]) -> dict[tuple[int, int], list[Event]]:
    """The events of each step of each region, in order."""
    found: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in events:
        found[event.region, event.step].append(event)
    return dict(sorted(found.items()))


def replay(spec: DiffusionSpec, canvas_length: int, events: list[Event]) -> Iterator[tuple[list[int], list[Event]]]:
    """The canvas before each step, with mask tokens, and what the step does."""
    canvas = [spec.mask_token_id] * canvas_length
    for here in moments(events).values():
        yield list(canvas), here
        for event in here:
            assert event.token is not None or canvas[event.position] != spec.mask_token_id
            canvas[event.position] = spec.mask_token_id if event.token is None else event.token


def log_distributions(
    policy, spec: DiffusionSpec, prompt_length: int, states: list[list[int]], temperature=1.0
) -> Tensor:
    """Log-probabilities at each position of some sequences of one length, from a forward pass without packing, float64."""
    length = len(states[0])
    allowed = who_sees_whom(spec, prompt_length, length)
    logits = policy(
        input_ids=torch.tensor(states),
        position_ids=torch.arange(length).expand(len(states), -1),
        attention_mask=allowed[None, None].expand(len(states), 1, -1, -1),
    ).logits.double()
    if not spec.predicts_mask_token:
        logits[..., spec.mask_token_id] = -torch.inf
    return (logits / temperature).log_softmax(-1)


def sequence_end(spec: DiffusionSpec, prompt_length: int, canvas_length: int, region: int) -> int:
    """Where the sequence ends that the policy sees: with its block, or with the canvas."""
    if spec.attention == "full":
        return prompt_length + canvas_length
    head = prompt_length // spec.block_size * spec.block_size if spec.block_origin == "sequence" else prompt_length
    return head + (region + 1) * spec.block_size


def replayed_logps(policy, spec: DiffusionSpec, batch: TrajectoryBatch, temperature: float = 1.0) -> Tensor:
    """The log-probability of each write, `(R, E)`, float64: one sequence without packing for each step."""
    width = batch.canvas_ids.shape[1] + (0 if batch.revisions is None else batch.revisions.steps.shape[1])
    found = torch.zeros(len(batch), width, dtype=torch.float64)
    for row in range(len(batch)):
        prompt, size = prompt_of(batch, row), int(batch.canvas_lengths[row])
        seen = defaultdict(list)  # by length: the sequence, and the writes of the step
        for canvas, here in replay(spec, size, events_of(spec, batch, row)):
            end = sequence_end(spec, len(prompt), size, here[0].region)
            writes = [event for event in here if event.token is not None]
            seen[end].append(((prompt + canvas)[:end], writes))
        for states in seen.values():
            log_probs = log_distributions(
                policy, spec, len(prompt), [tokens for tokens, _ in states], temperature or 1.0
            )
            for values, (_, writes) in zip(log_probs, states, strict=True):
                for event in writes:
                    place = read_at(spec, len(prompt), event.position)
                    found[row, event.column] = values[place, event.token]
    return found


# ------------------------------------------------------------------------------------------------------- random logs

Log = list[tuple[int, int, int | None]]  # step, position and token of each event, by region


def random_log(
    rng: random.Random, spec: DiffusionSpec, prompt_length: int, canvas_length: int, vocabulary: range, most: int = 5
) -> Log:
    """
    Writes, erasures and edits in any order, at most `most` writes at a position, as many as twice the positions and two more
    steps in a region, and positions that are masked in the end. An autoregressive token is written once, first.
    """
    regions: dict[int, list[int]] = defaultdict(list)
    for position in range(canvas_length):
        regions[region_of(spec, prompt_length, position)].append(position)
    log: Log = []
    for positions in regions.values():
        step = 0
        first = [position for position in positions if is_autoregressive(spec, prompt_length, position)]
        for position in first:
            log.append((step, position, rng.choice(vocabulary)))
            step += 1
        positions = [position for position in positions if position not in first]
        writes, visible = dict.fromkeys(positions, 0), set()
        for _ in range(rng.randint(1, 2 * len(positions) + 2) if positions else 0):
            here: Log = []
            for position in rng.sample(positions, rng.randint(1, len(positions))):
                if position in visible and (writes[position] == most or rng.random() < 0.5):
                    here.append((step, position, None))
                    visible.discard(position)
                elif writes[position] < most:
                    here.append((step, position, rng.choice(vocabulary)))
                    visible.add(position)
                    writes[position] += 1
            log += sorted(here, key=lambda event: event[1])
            step += bool(here)
    return log


def batch_of(
    rng: random.Random,
    spec: DiffusionSpec,
    prompts: list[list[int]],
    logs: list[Log],
    canvas_lengths: list[int],
    completion_lengths: list[int],
) -> TrajectoryBatch:
    """These logs as a batch, prompts padded on the left, with the writes that were taken back in any order. Recorded
    log-probabilities are random."""
    rows, width = len(prompts), max(canvas_lengths)
    canvas = torch.full((rows, width), spec.mask_token_id)
    steps, logps = torch.full((rows, width), -1), torch.zeros(rows, width)
    taken_back: list[list[tuple[int, int, int, int, float]]] = []
    for row, log in enumerate(logs):
        standing: dict[int, tuple[int, int, float]] = {}
        gone = []
        for step, position, token in log:
            if position in standing:
                before, old, logp = standing.pop(position)
                gone.append((position, old, before, step, logp))
            if token is not None:
                standing[position] = (step, token, -3 * rng.random() ** 4)
        for position, (step, token, logp) in standing.items():
            steps[row, position], canvas[row, position], logps[row, position] = step, token, logp
        rng.shuffle(gone)
        taken_back.append(gone)
    most = max(len(gone) for gone in taken_back)
    columns = torch.tensor(
        [[*gone, *[(0, 0, -1, 0, 0.0)] * (most - len(gone))] for gone in taken_back], dtype=torch.float64
    ).view(rows, most, 5)
    positions, tokens, times, until = (columns[..., index].long() for index in range(4))
    prompt_width = max(map(len, prompts))
    padded = torch.tensor([[0] * (prompt_width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (prompt_width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return TrajectoryBatch(
        prompt_ids=padded,
        prompt_mask=mask,
        canvas_ids=canvas,
        steps=steps,
        logps=logps,
        canvas_lengths=torch.tensor(canvas_lengths),
        completion_lengths=torch.tensor(completion_lengths),
        revisions=Revisions(positions, tokens, times, until, columns[..., 4].float()),
    )


def random_batch(
    rng: random.Random,
    spec: DiffusionSpec,
    rows: int = 3,
    longest_prompt: int = 9,
    most_blocks: int = 3,
    vocabulary=range(6, 39),
) -> TrajectoryBatch:
    """Random logs after random prompts. Neighbours may share a prompt."""
    prompts: list[list[int]] = []
    for _ in range(rows):
        if prompts and rng.random() < 0.5:
            prompts.append(prompts[-1])
        else:
            prompts.append([rng.choice(vocabulary) for _ in range(rng.randint(1, longest_prompt))])
    tails = [len(prompt) % spec.block_size if spec.block_origin == "sequence" else 0 for prompt in prompts]
    lengths = [rng.randint(1, most_blocks) * spec.block_size - tail for tail in tails]
    logs = [
        random_log(rng, spec, len(prompt), length, vocabulary) for prompt, length in zip(prompts, lengths, strict=True)
    ]
    return batch_of(rng, spec, prompts, logs, lengths, [rng.randint(1, length) for length in lengths])
