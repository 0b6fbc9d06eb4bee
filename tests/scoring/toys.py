"""
Toy policies whose decodings can all be enumerated: a few cells, three tokens of which one is a stop token, full attention. A
policy is a table of logits, one row for each state and cell, in float64 with a gradient. Which positions a step unmasks or takes
back is asked of the strategies of the package.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trl_diffusion.decoding.config import DecodingConfig
from trl_diffusion.decoding.revising import ReviseView
from trl_diffusion.decoding.strategies import SELECT_BY_SAMPLE, STRATEGIES, StepView
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
        return completion(self.canvas)


class Toy:
    """
    A policy over `cells` cells.

    Args:
        cells (`int`): positions of the canvas.
        seed (`int`): of its logits.
        scale (`float`): standard deviation of the logits.
        block_size (`int`, *optional*): positions of a block. All cells if `None`.
    """

    def __init__(self, cells: int, seed: int, scale: float = 1.0, block_size: int | None = None):
        self.cells = cells
        self.spec = DiffusionSpec(
            MASK,
            attention="full",
            block_size=block_size or cells,
            block_origin="response",
            stop_token_ids=(STOP,),
            predicts_visible_tokens=True,
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


@dataclass(frozen=True)
class Node:
    """
    A moment of a decoding that takes tokens back: the canvas, how often each cell's token was taken back, the active block, the
    steps of its schedule so far, the cells that were masked before the first one, whether the block was filled once, the steps
    after that, and the steps of the whole decoding.
    """

    canvas: State
    counts: tuple[int, ...]
    block: int = 0
    step: int = 0
    total: int = 0
    filled: bool = False
    revised: int = 0
    depth: int = 0


Change = tuple[
    tuple[tuple[int, int], ...], tuple[int, ...]
]  # what a step writes, (cell, token), and the cells that it erases
Situation = tuple[
    State, tuple[bool, ...], tuple[bool, ...], int
]  # canvas, candidates, cells that may be taken back, quota


class Chain:
    """
    All decodings of a toy with a strategy that takes tokens back, as a Markov chain: decodings that have come to the same node
    are one from there on. `edges` are pairs of nodes and the number of a change; `chances` and `scores` are those of changes,
    with a graph. A score is the sum of the log-probabilities of what a change writes, plus that of its selection if
    the settings say so.

    The loop is written out here as it is described: a step takes back what the strategy picks of the visible tokens, up to
    `revision_limit` times each. It unmasks as many positions as the schedule says, and as many as it erases, or all that are
    masked once the block was filled. The last step of a block erases nothing. A block ends when nothing is masked, and the step
    began like that and took nothing back, or the steps that are left are too few to take anything back.
    """

    def __init__(self, toy: Toy, config: DecodingConfig):
        assert config.revising is not None
        self.toy, self.config, self.revising = toy, config, config.revising
        self.by_situation: dict[Situation, dict[Change, int]] = {}
        self.changes: list[tuple[Situation, Change]] = []
        self.terms: list[
            tuple[int, float, list[int]]
        ] = []  # change, constant, entries of the table of log-probabilities
        self.layers: list[list[Node]] = [[self.begin(Node((MASK,) * toy.cells, (0,) * toy.cells, block=-1))]]
        self.edges: list[tuple[Node, int, Node]] = []
        self.after: dict[tuple[Node, int], Node] = {}
        while self.layers[-1]:
            self.layers.append(self.next_layer(self.layers[-1]))
        self.ends = [node for layer in self.layers for node in layer if node.block * toy.spec.block_size >= toy.cells]

    # ----------------------------------------------------------------------------------------------------- the loop

    def begin(self, node: Node) -> Node:
        """The same moment in the next block; block `cells / block_size` is the end."""
        start = (node.block + 1) * self.toy.spec.block_size
        masked = node.canvas[start : start + self.toy.spec.block_size].count(MASK)
        return Node(node.canvas, node.counts, node.block + 1, total=masked, depth=node.depth)

    def is_end(self, node: Node) -> bool:
        return node.block * self.toy.spec.block_size >= self.toy.cells

    def settle(self, node: Node) -> tuple[Node, Situation]:
        """What a step may do. Steps of the schedule that would unmask nothing are skipped."""
        config, end = self.config, (node.block + 1) * self.toy.spec.block_size
        masked = tuple(cell < end and token == MASK for cell, token in enumerate(node.canvas))
        step, left = node.step, sum(masked)
        quota = left
        if not node.filled:
            while not (quota := self.scheduled(step, node.total, left)):
                step += 1
        may = self.may_take_back(step, node.filled, node.revised)
        visible = tuple(
            may and cell < end and token != MASK and node.counts[cell] < config.revision_limit
            for cell, token in enumerate(node.canvas)
        )
        return replace(node, step=step), (node.canvas, masked, visible, min(quota, left))

    def may_take_back(self, step: int, filled: bool, revised: int) -> bool:
        """Whether a step may take tokens back. What it erases has to be written by another one."""
        needed, config = 1 if self.revising.edits else 2, self.config
        if config.steps_per_block is not None and config.steps_per_block - step < needed:
            return False
        return not filled or config.revision_steps is None or config.revision_steps - revised >= needed

    def scheduled(self, step: int, total: int, left: int) -> int:
        """How many positions the schedule fills at a step."""
        if self.config.steps_per_block is None:
            return self.config.tokens_per_step
        fill = math.ceil(self.config.fill_share * self.config.steps_per_block)
        return left if step + 1 >= fill else total // fill + (step < total % fill)

    def follow(self, node: Node, change: Change) -> Node:
        """The moment after a step."""
        writes, erased = change
        canvas, counts = list(node.canvas), list(node.counts)
        taken_back = [*erased, *(cell for cell, _ in writes if canvas[cell] != MASK)]
        for cell in taken_back:
            counts[cell] += 1
        for cell in erased:
            canvas[cell] = MASK
        for cell, token in writes:
            canvas[cell] = token
        end = (node.block + 1) * self.toy.spec.block_size
        left = canvas[:end].count(MASK)
        revised, step = node.revised + node.filled, node.step + 1
        over = (node.filled and not taken_back) or not self.may_take_back(step, True, revised)
        found = Node(
            tuple(canvas),
            tuple(counts),
            node.block,
            step,
            node.total,
            node.filled or not left,
            revised,
            node.depth + 1,
        )
        if left or not over:
            return found
        last = STOP in canvas[:end] or end >= self.toy.cells
        return Node(found.canvas, (), block=self.toy.cells, depth=found.depth) if last else self.begin(found)

    def next_layer(self, nodes: list[Node]) -> list[Node]:
        at = [(node, *self.settle(node)) for node in nodes if not self.is_end(node)]
        self.find_changes({situation for _, _, situation in at} - set(self.by_situation))
        found: dict[Node, None] = {}
        for node, settled, situation in at:
            for change, number in self.by_situation[situation].items():
                after = self.follow(settled, change)
                self.edges.append((node, number, after))
                self.after[node, number] = after
                found[after] = None
        return list(found)

    # -------------------------------------------------------------------------------------------- what a step can do

    def find_changes(self, situations: set[Situation]) -> None:
        """Everything that a step can do in these situations, and with what probability, which the package's strategies say."""
        rows = [(situation, *one) for situation in sorted(situations) for one in self.chances_of(situation)]
        if not rows:
            return
        written, erased = self.choose(rows)
        for index, (situation, proposal, constant, _, _) in enumerate(rows):
            canvas, changes = situation[0], self.by_situation.setdefault(situation, {})
            cells = [cell for cell in range(self.toy.cells) if written[index][cell]]
            gone = tuple(cell for cell in range(self.toy.cells) if erased[index][cell])
            proposals: Any = itertools.product(TOKENS, repeat=len(cells))
            if proposal is not None:
                proposals = [tuple(proposal[cell] for cell in cells)]
            for tokens in proposals:
                change = (tuple(zip(cells, tokens, strict=True)), gone)
                if change not in changes:
                    changes[change] = len(self.changes)
                    self.changes.append((situation, change))
                sampled = change[0] if proposal is None else proposal.items()
                self.terms.append((changes[change], constant, [self.entry(canvas, *write) for write in sampled]))

    def entry(self, canvas: State, cell: int, token: int) -> int:
        """Place in the table of log-probabilities."""
        return (self.toy.numbers[canvas] * self.toy.cells + cell) * len(TOKENS) + token

    def chances_of(
        self, situation: Situation
    ) -> Iterator[tuple[dict[int, int] | None, float, list[float], list[float]]]:
        """What is random: the proposed tokens, where they matter, and the random numbers of the two strategies."""
        _, masked, visible, quota = situation
        looked = [cell for cell in range(self.toy.cells) if masked[cell] or visible[cell]]
        proposals: Any = [None]
        if self.config.strategy in SELECT_BY_SAMPLE or self.config.revision == "sampled_edit":
            proposals = [dict(zip(looked, p, strict=True)) for p in itertools.product(TOKENS, repeat=len(looked))]
        orders: Any = [[0.0] * self.toy.cells]
        candidates = [cell for cell in looked if masked[cell]]
        if self.config.strategy == "random":
            orders = [
                [float(dict(zip(candidates, order, strict=True)).get(cell, 0)) for cell in range(self.toy.cells)]
                for order in itertools.permutations(range(len(candidates)))
            ]
        subsets: Any = [(1.0, [0.0] * self.toy.cells)]
        if self.config.revision == "random":
            rate = self.rate(sum(visible), sum(masked), quota)
            subsets = [
                (
                    rate ** sum(gone) * (1 - rate) ** (sum(visible) - sum(gone)),
                    [0.0 if g else 1.0 - 1e-9 for g in gone],
                )
                for gone in itertools.product(*[(False, True) if may and rate else (False,) for may in visible])
            ]
        for proposal, order, (chance, uniforms) in itertools.product(proposals, orders, subsets):
            yield proposal, chance / len(orders), order, uniforms

    def rate(self, visible: int, masked: int, quota: int) -> float:
        """Of ReMDM: the largest rate with which the schedule can still be kept, up to a cap."""
        if not visible:
            return 0.0
        return min(self.config.revision_rate, (masked - quota) / visible)

    def choose(self, rows) -> tuple[list[list[bool]], list[list[bool]]]:
        """What the strategies of the package write and erase in each row, `(N, cells)`."""
        toy, config = self.toy, self.config
        canvases = [situation[0] for situation, *_ in rows]
        states = toy.log_probs.detach()[[toy.numbers[canvas] for canvas in canvases]]  # (N, cells, tokens)
        masked, visible = (torch.tensor([row[0][index] for row in rows]) for index in (1, 2))
        quota = torch.tensor([row[0][3] for row in rows])
        orders, uniforms = (torch.tensor([row[index] for row in rows], dtype=torch.float64) for index in (3, 4))
        looked = masked | visible

        def of(tokens: Tensor) -> Tensor:
            return states.gather(2, tokens.clamp(max=len(TOKENS) - 1)[..., None]).squeeze(2).masked_fill(~looked, 0.0)

        best = states.argmax(2)
        shown = torch.tensor(canvases)
        sampled = torch.tensor([[(row[1] or {}).get(cell, 0) for cell in range(toy.cells)] for row in rows])
        selected = self.revising.select(
            ReviseView(
                masked=masked,
                visible=visible,
                quota=quota,
                limit=torch.full_like(quota, config.revision_max or math.ceil(toy.cells / 5)),
                shown_logps=of(shown).masked_fill(~visible, 0.0),
                best_logps=of(best),
                best_differs=(best != shown) & visible,
                sampled_logps=of(sampled),
                sampled_differs=(sampled != shown) & visible,
                config=config,
                uniforms=uniforms,
            )
        )
        edited = selected if self.revising.edits else torch.zeros_like(selected)
        erased = selected & ~edited
        places = masked.nonzero(as_tuple=True)
        unmasked = STRATEGIES[config.strategy](
            StepView(
                candidates=masked,
                quota=(quota + erased.sum(1)).minimum(masked.sum(1)),
                token_logps=of(sampled).masked_fill(~masked, 0.0),
                best_logps=of(best).masked_fill(~masked, 0.0),
                log_probs=states[places],
                places=places,
                config=config,
                uniforms=orders,
            )
        )
        return ((unmasked & masked) | edited).tolist(), erased.tolist()

    # ------------------------------------------------------------------------------------------------- probabilities

    def chances(self, toy: Toy | None = None) -> Tensor:
        """The probability of each change."""
        table = (toy or self.toy).log_probs.flatten()
        width = max(len(entries) for _, _, entries in self.terms)
        entries = torch.tensor([[*entries, *[len(table)] * (width - len(entries))] for _, _, entries in self.terms])
        table = torch.cat([table, table.new_zeros(1)])  # one more entry, for what is padding
        constants = torch.tensor([constant for _, constant, _ in self.terms], dtype=torch.float64)
        values = constants * table[entries.long()].sum(1).exp()
        numbers = torch.tensor([number for number, _, _ in self.terms])
        return table.new_zeros(len(self.changes)).index_add(0, numbers, values)

    def scores(self, toy: Toy | None = None) -> Tensor:
        """The score of each change, under this toy or another one."""
        toy = toy or self.toy
        table, zero = toy.log_probs.flatten(), torch.zeros((), dtype=torch.float64)
        found = []
        for situation, (writes, _) in self.changes:
            own = [table[self.entry(situation[0], *write)] for write in writes]
            if self.config.selection is not None:
                own.append(self.selection_logp(toy, situation, dict(writes)))
            found.append(sum(own, zero))
        return torch.stack(found)

    def selection_logp(self, toy: Toy, situation: Situation, writes: dict[int, int]) -> Tensor:
        """The log-probability of which masked cells are written, of the package."""
        canvas, candidates = situation[:2]
        masked = [cell for cell in range(toy.cells) if candidates[cell]]
        log_probs = toy.log_probs[toy.numbers[canvas]][masked]
        unmasked = torch.tensor([cell in writes for cell in masked], dtype=torch.bool)
        tokens = torch.tensor([writes.get(cell, 0) for cell in masked], dtype=torch.long)
        assert self.config.selection is not None
        one = torch.zeros(len(masked), dtype=torch.long)
        return self.config.selection.shares(log_probs, log_probs, tokens, one, unmasked, ~unmasked).sum()

    def numbered(self) -> tuple[dict[Node, int], list[tuple[Tensor, Tensor, Tensor]]]:
        """A number for each node, and the edges of each layer: from, change, to."""
        numbers = {node: index for index, node in enumerate(dict.fromkeys(n for layer in self.layers for n in layer))}
        layers: list[list[tuple[int, int, int]]] = [[] for _ in self.layers]
        for node, change, after in self.edges:
            layers[node.depth].append((numbers[node], change, numbers[after]))
        return numbers, [tuple(torch.tensor(own).T) for own in layers if own]  # type: ignore[misc]

    def expectations(self, scores: Tensor, reward_seed: int = 0) -> tuple[float, float, float]:
        """
        The expected gradient of the score-function estimator beside the gradient of the expected reward. Rewards are functions
        of the completion alone.

        Returns:
            `(sum of all probabilities, relative error, cosine)`.
        """
        numbers, layers = self.numbered()
        chances = self.chances()
        reached = chances.new_zeros(len(numbers)).index_fill(0, torch.tensor([0]), 1.0)
        for source, change, target in layers:
            reached = reached.index_add(0, target, reached[source] * chances[change])
        rewards = chances.new_zeros(len(numbers))
        ends = torch.tensor([numbers[node] for node in self.ends])
        rewards[ends] = torch.tensor(
            [reward(completion(node.canvas), reward_seed) for node in self.ends], dtype=torch.float64
        )
        expected = (reached[ends] * rewards[ends]).sum()
        exact = self.toy.gradient(expected)
        with torch.no_grad():
            value = rewards.clone()  # of a node: the expected reward from there on
            for source, change, target in reversed(layers):
                value.index_add_(0, source, chances[change] * value[target])
        estimate = scores.new_zeros(())
        for source, change, target in layers:
            weights = reached[source] * chances[change] * (value[target] - expected)  # without the mean, as in a group
            estimate = estimate + (weights.detach() * scores[change]).sum()
        estimated = self.toy.gradient(estimate)
        error = ((estimated - exact).norm() / exact.norm()).item()
        cosine = torch.cosine_similarity(estimated, exact, dim=0).item()
        return reached[ends].sum().item(), error, cosine

    def mean_ratio(self, log_ratios: Tensor) -> float:
        """The expectation of the exponential of the sum of what each change has."""
        numbers, layers = self.numbered()
        with torch.no_grad():
            chances, value = self.chances(), torch.zeros(len(numbers), dtype=torch.float64)
            value[[numbers[node] for node in self.ends]] = 1.0
            for source, change, target in reversed(layers):
                value.index_add_(0, source, chances[change] * log_ratios[change].exp() * value[target])
        return value[0].item()


def completion(canvas: State) -> State:
    """The tokens up to the first stop token."""
    return canvas[: canvas.index(STOP) + 1] if STOP in canvas else canvas


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
