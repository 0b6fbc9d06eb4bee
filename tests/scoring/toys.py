"""
Toy policies whose decodings can all be enumerated: a few cells, three tokens of which one is a stop token, one block with
full attention. A policy is a table of logits, one row for each state and cell, in float64 with a gradient. Which positions a
step unmasks is asked of the strategies of the package.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trl_diffusion.decoding.config import DecodingConfig
from trl_diffusion.decoding.strategies import STRATEGIES, StepView
from trl_diffusion.policies.spec import DiffusionSpec
from trl_diffusion.trajectories.trajectory import NEVER, TrajectoryBatch


STOP, MASK = 2, 3
TOKENS = (0, 1, STOP)
State = tuple[int, ...]  # the token of each cell


@dataclass(frozen=True)
class Event:
    """A write: step, cell, token, and the log-probability of the token in the state before the step, with a graph."""

    step: int
    cell: int
    token: int
    logp: Tensor


@dataclass(frozen=True)
class Decoding:
    """One way in which a decoding can go: its probability, with a graph, its writes, and the canvas in the end."""

    chance: Tensor
    events: tuple[Event, ...]
    canvas: State

    @property
    def completion(self) -> State:
        """The tokens up to the first stop token."""
        return self.canvas[: self.canvas.index(STOP) + 1] if STOP in self.canvas else self.canvas


class Toy:
    """
    A policy over `cells` cells.

    Args:
        cells (`int`): positions of the canvas.
        seed (`int`): of its logits.
        scale (`float`): standard deviation of the logits.
    """

    def __init__(self, cells: int, seed: int, scale: float = 1.0):
        self.cells = cells
        self.spec = DiffusionSpec(
            MASK, attention="full", block_size=cells, block_origin="response", stop_token_ids=(STOP,)
        )
        states = itertools.product((*TOKENS, MASK), repeat=cells)
        self.numbers = {state: number for number, state in enumerate(states)}
        generator = torch.Generator().manual_seed(seed)
        shape = (len(self.numbers), cells, len(TOKENS))
        self.logits = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    @cached_property
    def log_probs(self) -> Tensor:
        """Log-probability of each token at each cell in each state, `(states, cells, tokens)`."""
        return self.logits.log_softmax(-1)

    def logp(self, state: State, cell: int, token: int) -> Tensor:
        return self.log_probs[self.numbers[state], cell, token]

    # ------------------------------------------------------------------------------------------------ enumeration

    def decodings(self, config: DecodingConfig) -> list[Decoding]:
        """Every way in which a decoding with these settings can go; their probabilities sum to 1."""
        leaves = []
        one = torch.ones((), dtype=torch.float64)
        stack = [Decoding(one, (), (MASK,) * self.cells)]
        while stack:
            at = stack.pop()
            if self.is_over(at.canvas, config):
                leaves.append(at)
                continue
            step = at.events[-1].step + 1 if at.events else 0
            for writes, chance in self.outcomes(at.canvas, config).items():
                events = tuple(Event(step, cell, token, self.logp(at.canvas, cell, token)) for cell, token in writes)
                canvas = list(at.canvas)
                for cell, token in writes:
                    canvas[cell] = token
                stack.append(Decoding(at.chance * chance, (*at.events, *events), tuple(canvas)))
        return leaves

    def is_over(self, canvas: State, config: DecodingConfig) -> bool:
        if config.stop_rule == "token" and STOP in canvas:
            return MASK not in canvas[: canvas.index(STOP)]
        return MASK not in canvas

    def outcomes(self, state: State, config: DecodingConfig) -> dict[tuple[tuple[int, int], ...], Tensor]:
        """What a step can write in this state, `((cell, token), ...)`, and with what probability."""
        masked = [cell for cell in range(self.cells) if state[cell] == MASK]
        proposals = list(itertools.product(TOKENS, repeat=len(masked)))
        orders: list[tuple[int, ...] | None] = [None]
        if config.strategy == "random":
            orders = list(itertools.permutations(range(len(masked))))
        found: dict[tuple[tuple[int, int], ...], Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        logps = torch.stack(
            [sum(self.logp(state, c, t) for c, t in zip(masked, proposal, strict=True)) for proposal in proposals]
        )
        for order in orders:
            chosen = self.choose(state, masked, proposals, order, config)
            for row, proposal in enumerate(proposals):
                writes = tuple((c, t) for c, t in zip(masked, proposal, strict=True) if chosen[row, c])
                found[writes] = found[writes] + logps[row].exp() / len(orders)
        return dict(found)

    def choose(self, state, masked, proposals, order, config: DecodingConfig) -> Tensor:
        """What the strategy picks for each proposal of tokens, boolean `(proposals, cells)`."""
        count = len(proposals)
        candidates = torch.zeros(count, self.cells, dtype=torch.bool)
        candidates[:, masked] = True
        log_probs = self.log_probs.detach()[self.numbers[state]][masked]  # (M, 3)
        token_logps = torch.zeros(count, self.cells, dtype=torch.float64)
        for place, cell in enumerate(masked):
            token_logps[:, cell] = log_probs[place, [proposal[place] for proposal in proposals]]
        uniforms = torch.zeros(count, self.cells, dtype=torch.float64)
        if order is not None:
            uniforms[:, masked] = torch.tensor(order, dtype=torch.float64)
        best_logps = torch.zeros(count, self.cells, dtype=torch.float64)
        best_logps[:, masked] = log_probs.amax(1)
        rows, columns = candidates.nonzero(as_tuple=True)
        view = StepView(
            candidates=candidates,
            quota=torch.full((count,), min(config.tokens_per_step, len(masked))),
            token_logps=token_logps,
            best_logps=best_logps,
            log_probs=log_probs.repeat(count, 1),
            places=(rows, columns),
            config=config,
            uniforms=uniforms,
        )
        return STRATEGIES[config.strategy](view)

    def replay(self, decodings: list[Decoding]) -> list[Decoding]:
        """The same writes with this policy's log-probabilities."""
        found = []
        for decoding in decodings:
            canvas, events = [MASK] * self.cells, []
            for step in range(decoding.events[-1].step + 1):
                writes = [event for event in decoding.events if event.step == step]
                events += [Event(step, e.cell, e.token, self.logp(tuple(canvas), e.cell, e.token)) for e in writes]
                for event in writes:
                    canvas[event.cell] = event.token
            found.append(Decoding(decoding.chance, tuple(events), decoding.canvas))
        return found

    def trajectories(self, decodings: list[Decoding]) -> TrajectoryBatch:
        """Decodings as the package has them, behind a prompt of one token."""
        count = len(decodings)
        steps = torch.full((count, self.cells), NEVER)
        logps = torch.zeros(count, self.cells)
        for row, decoding in enumerate(decodings):
            for event in decoding.events:
                steps[row, event.cell], logps[row, event.cell] = event.step, event.logp.item()
        return TrajectoryBatch(
            prompt_ids=torch.zeros(count, 1, dtype=torch.long),
            prompt_mask=torch.ones(count, 1, dtype=torch.long),
            canvas_ids=torch.tensor([decoding.canvas for decoding in decodings]),
            steps=steps,
            logps=logps,
            canvas_lengths=torch.full((count,), self.cells),
            completion_lengths=torch.tensor([len(decoding.completion) for decoding in decodings]),
        )

    # --------------------------------------------------------------------------------------------------- gradients

    def gradient(self, objective: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(objective, self.logits, retain_graph=True)
        return found.flatten()


def reward(completion: State, seed: int = 0) -> float:
    """Any number, a function of the completion alone."""
    number = sum((token + 1) * 4**place for place, token in enumerate(completion))
    return torch.rand((), generator=torch.Generator().manual_seed(1000 * seed + number), dtype=torch.float64).item()


def score(decodings: list[Decoding], counts: Callable[[int, Event], bool]) -> Tensor:
    """The sum of the log-probabilities of the writes that count, for each decoding, with a graph."""
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack(
        [
            sum((event.logp for event in decoding.events if counts(row, event)), zero)
            for row, decoding in enumerate(decodings)
        ]
    )


def compare(toy: Toy, decodings: list[Decoding], scores: Tensor) -> tuple[float, float]:
    """
    The expected gradient of the score-function estimator beside the gradient of the expected reward.

    Returns:
        `(relative error, cosine)`.
    """
    chances = torch.stack([decoding.chance for decoding in decodings])
    rewards = torch.tensor([reward(decoding.completion) for decoding in decodings], dtype=torch.float64)
    exact = toy.gradient((chances * rewards).sum())
    advantages = rewards - (chances.detach() * rewards).sum()  # without the mean, as in a group
    estimated = toy.gradient((chances.detach() * advantages * scores).sum())
    error = ((estimated - exact).norm() / exact.norm()).item()
    return error, torch.cosine_similarity(estimated, exact, dim=0).item()
