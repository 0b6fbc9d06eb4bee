"""
What the method says, written out in plain loops: independent of the package, for the tests to compare with. And the rollouts and
policies that they compare.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from tests.conftest import make_prompts
from trl_diffusion import DiffusionSpec
from trl_diffusion.decoding.config import DecodingConfig
from trl_diffusion.decoding.decode import decode
from trl_diffusion.scoring.draws import StepDraw
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.states import drawn_states
from trl_diffusion.trajectories.trajectory import NEVER, TrajectoryBatch, response_blocks


def block_of(spec: DiffusionSpec, prompt_length: int, column: int) -> int:
    """Block of a canvas position, counted from the one that holds the first response token."""
    if spec.block_origin == "sequence":
        return (prompt_length + column) // spec.block_size - prompt_length // spec.block_size
    return column // spec.block_size


def who_sees_whom(spec: DiffusionSpec, prompt_length: int, length: int) -> Tensor:
    """
    Which position of a sequence sees which, `(length, length)`, while its last block is denoised. Each rule of
    [`DiffusionSpec`] is written out.
    """
    if spec.attention == "full":
        return torch.ones(length, length, dtype=torch.bool)
    blocks = torch.tensor([block_of(spec, prompt_length, position - prompt_length) for position in range(length)])
    if spec.block_origin == "response":
        blocks = blocks.clamp(min=-1)
    if spec.clean_attention == "block":
        return blocks[None, :] <= blocks[:, None]
    return torch.ones(length, length).tril().bool() | (blocks == blocks[-1])[:, None]


def read_at(spec: DiffusionSpec, prompt_length: int, column: int) -> int:
    """The position whose logits predict the token of a canvas position."""
    begins = block_of(spec, prompt_length, column) != block_of(spec, prompt_length, column - 1)
    before = spec.token_shift or (begins and spec.first_token == "autoregressive")
    return prompt_length + column - int(before)


def writes_that_count(spec: DiffusionSpec, batch: TrajectoryBatch) -> Tensor:
    """
    The writes of a decoding up to the one that settles the completion, `(R, C)`: the decoding is replayed step by step until
    no position of the completion is masked. Of the last step, those of the completion.
    """
    found = torch.zeros(batch.steps.shape, dtype=torch.bool)
    for row in range(len(batch)):
        steps, length = batch.steps[row].tolist(), int(batch.completion_lengths[row])
        prompt_length = int(batch.prompt_lengths[row])
        moments: dict[tuple[int, int], list[int]] = {}  # positions written at each step of each block
        for column, step in enumerate(steps):
            if step >= 0:
                moments.setdefault((block_of(spec, prompt_length, column), step), []).append(column)
        masked = {column for column in range(length) if steps[column] >= 0}
        for moment in sorted(moments):
            if not masked:
                break
            masked -= set(moments[moment])
            counted = moments[moment] if masked else [column for column in moments[moment] if column < length]
            found[row, counted] = True
    return found


def causal_logps(model, ids, mask, width, temperature):
    """Log-probabilities of the last `width` tokens under a causal model."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, :-1] / temperature
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)[:, -width:]


DECODINGS = {
    "two-per-step": DecodingConfig(max_new_tokens=24, temperature=1.0, tokens_per_step=2),
    "three-per-step-tempered": DecodingConfig(max_new_tokens=21, temperature=0.7, tokens_per_step=3),
    "threshold": DecodingConfig(max_new_tokens=20, temperature=1.3, strategy="threshold", threshold=0.2),
    "greedy": DecodingConfig(max_new_tokens=24, temperature=0.0),
    "stop-at-token": DecodingConfig(
        max_new_tokens=22, temperature=1.0, strategy="entropy_bound", entropy_bound=1.5, stop_rule="token"
    ),
}


def rollout(policy, decoding, seed=0) -> TrajectoryBatch:
    prompts = make_prompts(seed=seed)
    return decode(policy, prompts, decoding, seeds=[100 + row for row in range(len(prompts))])


def another(policy):
    """A policy with other weights."""
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for index, parameter in enumerate(other.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(0.1 * parameter.std(correction=0).clamp(min=0.01) * noise)
    return other


def draw_everything_at(step: int, batch: TrajectoryBatch, blocks) -> StepDraw:
    """The draw that scores state `step` of every group of tokens."""
    shape = (len(batch), int(blocks.max()) + 1)
    return StepDraw(torch.full((*shape, 1), step), torch.ones(*shape, 1), torch.ones(shape))


def lay_out(batch: TrajectoryBatch, spec, draw: StepDraw, **options):
    return pack(batch, spec, drawn_states(batch, spec, draw), **options)


def plain_forward_logps(policy, spec, batch: TrajectoryBatch, temperature: float):
    """
    The log-probability of every token, from un-packed forward passes of every state: the sequence as the policy saw it (with
    block attention nothing behind the active block, with full attention masks), the attention written out position by position.
    Independent of `pack`.
    """
    result = torch.zeros_like(batch.logps)
    for row in range(len(batch)):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row] == 1].tolist()
        origin = 0 if spec.block_origin == "sequence" else len(prompt)
        block_of = lambda i, origin=origin: max((i - origin) // spec.block_size, -1 if origin else -(10**9))  # noqa: E731
        canvas, steps = batch.canvas_ids[row].tolist(), batch.steps[row].tolist()
        columns_of = defaultdict(list)  # of each sequence that the policy saw, the tokens that it then unmasked
        for column in [column for column, step in enumerate(steps) if step >= 0]:
            position = len(prompt) + column
            end = origin + (block_of(position) + 1) * spec.block_size
            if spec.attention == "full":
                end = len(prompt) + int(batch.canvas_lengths[row])
            tokens = prompt + [
                token
                if block_of(len(prompt) + j) < block_of(position)
                or (block_of(len(prompt) + j) == block_of(position) and 0 <= steps[j] < steps[column])
                else spec.mask_token_id
                for j, token in enumerate(canvas)
            ]
            columns_of[tuple(tokens[:end])].append(column)
        for length in {len(tokens) for tokens in columns_of}:
            states = [tokens for tokens in columns_of if len(tokens) == length]
            allowed = who_sees_whom(spec, len(prompt), length)
            logits = policy(
                input_ids=torch.tensor(states),
                position_ids=torch.arange(length).expand(len(states), -1),
                attention_mask=allowed[None, None].expand(len(states), 1, -1, -1),
            ).logits.double()
            if not spec.predicts_mask_token:
                logits[..., spec.mask_token_id] = -torch.inf
            log_probs = (logits / (temperature or 1.0)).log_softmax(-1)
            for state, tokens in enumerate(states):
                for column in columns_of[tokens]:
                    result[row, column] = log_probs[state, read_at(spec, len(prompt), column), canvas[column]]
    return result


def hand_made_steps():
    """Two responses whose blocks have different numbers of steps, of different sizes."""
    blocks = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]])
    steps = torch.tensor([[2, 0, 1, 0, 0, 0, 0, 1, 3, 1], [0, 1, 1, 0, 2, 2, -1, 0, 0, 0]])
    counted = torch.tensor([[True] * 10, [True] * 9 + [False]])
    return blocks, steps, counted


def possible_sets(sizes: dict[int, int], distribution: str, num_draws: int) -> dict[tuple[int, ...], float]:
    """
    Every set of steps that can be drawn in a block, and its probability (docs/method.md, section 2). Token-proportional: a
    step gets `n_t / n` of the draws, one that would get a whole draw is certain, and the others, in a random order, are
    drawn where `u, u + 1, ...` fall on their probabilities laid end to end.
    """
    number = min(num_draws, len(sizes))
    if distribution == "uniform":
        sets = list(itertools.combinations(sorted(sizes), number))
        return dict.fromkeys(sets, 1 / len(sets))
    rest, certain = dict(sizes), []
    while sure := [t for t, n in rest.items() if n * (number - len(certain)) >= sum(rest.values())]:
        certain += sure
        for step in sure:
            del rest[step]
    chances: dict[tuple[int, ...], Fraction] = Counter()
    left = number - len(certain)
    orders = list(itertools.permutations(rest)) if left > 1 else [tuple(rest)]  # a single draw knows no order
    for order in orders:
        ends = list(itertools.accumulate(Fraction(rest[t] * left, sum(rest.values())) for t in order))
        starts = sorted({Fraction(0), Fraction(1), *(end % 1 for end in ends)})
        for low, high in itertools.pairwise(starts):
            marks = [(low + high) / 2 + j for j in range(left)]
            drawn = [next(t for t, end in zip(order, ends, strict=True) if end > mark) for mark in marks]
            assert len(set(drawn)) == left
            chances[tuple(sorted(certain + drawn))] += (high - low) / len(orders)
    assert sum(chances.values()) == 1
    return {outcome: float(chance) for outcome, chance in chances.items()}


def weights_of(outcomes: dict[tuple[int, ...], float]) -> dict[int, float]:
    """The inverse of each step's probability of being drawn."""
    steps = sorted({step for outcome in outcomes for step in outcome})
    return {step: 1 / sum(chance for outcome, chance in outcomes.items() if step in outcome) for step in steps}


def pad_differently(batch: TrajectoryBatch) -> TrajectoryBatch:
    """The same responses with right-padded prompts, wider padding, and rubbish in it."""
    rows, width = batch.prompt_ids.shape
    order = (batch.prompt_mask == 0).long().sort(dim=1, stable=True).indices
    prompt = torch.cat([batch.prompt_ids.gather(1, order), torch.full((rows, 5), 17)], 1)
    mask = torch.cat([batch.prompt_mask.gather(1, order), torch.zeros(rows, 5, dtype=torch.long)], 1)
    inside = torch.arange(batch.canvas_ids.shape[1]) < batch.canvas_lengths[:, None]
    assert (batch.steps[~inside] == -1).all()
    canvas = torch.cat([batch.canvas_ids.masked_fill(~inside, 23), torch.full((rows, 7), 23)], 1)
    return replace(
        batch,
        prompt_ids=prompt.masked_fill(mask == 0, 11),
        prompt_mask=mask,
        canvas_ids=canvas,
        steps=torch.cat([batch.steps, torch.full((rows, 7), -1)], 1),
        logps=torch.cat([batch.logps, torch.zeros(rows, 7)], 1),
    )


def states_of(batch, spec, config: EstimatorConfig, seeds=None):
    seeds = list(range(len(batch))) if seeds is None else seeds
    return ESTIMATORS[config.name].states(batch, spec, seeds, config)


def by_hand(policy, spec, prompt: list[int], canvas: list[int]):
    """Log-probabilities at all canvas positions when the policy sees `prompt + canvas` as given; no packing."""
    tokens = torch.tensor([prompt + canvas])
    positions = torch.arange(tokens.shape[1])
    allowed = who_sees_whom(spec, len(prompt), tokens.shape[1])
    logits = (
        policy(input_ids=tokens, position_ids=positions[None], attention_mask=allowed[None, None]).logits[0].double()
    )
    if not spec.predicts_mask_token:
        logits[:, spec.mask_token_id] = -torch.inf
    return logits.log_softmax(-1)[[read_at(spec, len(prompt), column) for column in range(len(canvas))]]


def masked_logps(policy, spec, prompt, canvas, hidden, autoregressive):
    """
    Log-probability of every canvas token under a mask pattern. Block attention: each block is shown with the mask
    pattern, the blocks before it clean. `hidden` and `autoregressive` are lists of booleans.
    """
    origin = len(prompt) % spec.block_size if spec.block_origin == "sequence" else 0
    block = [(origin + i) // spec.block_size for i in range(len(canvas))]
    result = torch.zeros(len(canvas), dtype=torch.double)
    for current in sorted(set(block)) if spec.attention == "block" else [None]:
        own = [i for i in range(len(canvas)) if current is None or block[i] == current]
        shown = [
            spec.mask_token_id if hidden[i] and (current is None or block[i] >= current) else token
            for i, token in enumerate(canvas)
        ]
        if current is not None:
            shown = shown[: own[-1] + 1]
        table = by_hand(policy, spec, prompt, shown)
        for i in own:
            if not autoregressive[i]:
                result[i] = table[i, canvas[i]]
    clean = by_hand(policy, spec, prompt, canvas)  # the token before a block sees no further
    for i in range(len(canvas)):
        if autoregressive[i]:
            result[i] = clean[i, canvas[i]]
    return result


def rows_of(batch: TrajectoryBatch, spec):
    """Per response: prompt, canvas, what was never unmasked, tokens made autoregressively, tokens that count, blocks."""
    blocks = response_blocks(spec, batch.prompt_lengths, batch.canvas_ids.shape[1])
    for row in range(len(batch)):
        length = int(batch.canvas_lengths[row])
        prompt = batch.prompt_ids[row][batch.prompt_mask[row] == 1].tolist()
        tail = len(prompt) % spec.block_size if spec.block_origin == "sequence" else 0
        first = [(tail + i) % spec.block_size == 0 and spec.first_token == "autoregressive" for i in range(length)]
        never = (batch.steps[row, :length] == NEVER).tolist()
        counts = [i < int(batch.completion_lengths[row]) and not never[i] for i in range(length)]
        yield row, prompt, batch.canvas_ids[row, :length].tolist(), never, first, counts, blocks[row, :length].tolist()


def group_rollout(policy, sizes=(3, 3, 3), lengths=(29, 48, 35)) -> TrajectoryBatch:
    """Several responses to each of a few prompts."""
    prompts = [p for p, size in zip(make_prompts(lengths), sizes, strict=True) for _ in range(size)]
    return decode(policy, prompts, DECODINGS["two-per-step"], seeds=list(range(len(prompts))))
