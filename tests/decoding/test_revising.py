"""
Decoders that take tokens back. Each published rule against a few lines written from its paper, on random distributions and in the
whole loop, without a cache and without packing; what must not change a response; and where it ends.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.closeness import assert_close
from tests.conftest import MASK, SPECS, STOP, make_policy, make_prompts
from tests.events import events_of, is_autoregressive, log_distributions, region_of, sequence_end
from tests.reference import read_at
from trl_diffusion import DecodingConfig, decode
from trl_diffusion.decoding import loop
from trl_diffusion.decoding.revising import REVISIONS, ReviseView, Revising
from trl_diffusion.decoding.strategies import STRATEGIES
from trl_diffusion.trajectories.trajectory import TrajectoryBatch


STOPS = tuple(range(STOP, STOP + 4))


def spec_of(name: str, **changes):
    """A spec of a policy that may write over visible tokens."""
    return SPECS[name].replace(predicts_visible_tokens=True, **{"stop_token_ids": STOPS, **changes})


# -------------------------------------------------------------------------------------------- the rules, on random views


@dataclass
class Moment:
    """What a rule may look at: of each position, the log-distribution, the visible token and a sampled one."""

    log_probs: Tensor
    shown: Tensor
    sampled: Tensor
    view: ReviseView

    def p(self, row: int, column: int, tokens: Tensor | None = None) -> float:
        """The probability of a token at a position, or the largest one."""
        own = self.log_probs[row, column]
        return (own.max() if tokens is None else own[tokens[row, column]]).exp().item()


def random_moment(seed: int, rows: int = 40, width: int = 9, config: DecodingConfig | None = None) -> Moment:
    """Of each position, whether it is masked, visible, or neither (its token may not be taken back any more)."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = (2 * torch.randn(rows, width, 6, generator=generator)).log_softmax(-1)
    shown, sampled = (torch.randint(0, 6, (rows, width), generator=generator) for _ in range(2))
    kind = torch.randint(0, 3, (rows, width), generator=generator)
    masked, visible = kind == 0, kind == 1
    neither, looked = torch.zeros(rows, width), masked | visible

    def of(tokens: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, log_probs.gather(2, tokens[..., None]).squeeze(2), neither)

    view = ReviseView(
        masked=masked,
        visible=visible,
        quota=torch.minimum(torch.randint(1, 4, (rows,), generator=generator), masked.sum(1)),
        limit=torch.randint(1, 5, (rows,), generator=generator),
        shown_logps=of(shown, visible),
        best_logps=of(log_probs.argmax(2), looked),
        best_differs=(log_probs.argmax(2) != shown) & visible,
        sampled_logps=of(sampled, looked),
        sampled_differs=(sampled != shown) & visible,
        config=DecodingConfig(width) if config is None else config,
        uniforms=torch.rand(rows, width, generator=generator),
    )
    return Moment(log_probs, shown, sampled, view)


def wino(moment: Moment, row: int, threshold: float) -> set[int]:
    """Visible tokens that the policy now gives less than the threshold, the least likely first."""
    ranked = sorted((moment.p(row, c, moment.shown), c) for c in moment.view.visible[row].nonzero().flatten().tolist())
    return {c for p, c in [(p, c) for p, c in ranked if p < threshold][: int(moment.view.limit[row])]}


def p2(moment: Moment, row: int) -> set[int]:
    """All positions in one ranking; of these the first ones stay visible or become so, as many as the schedule says."""
    masked, visible = (one[row].nonzero().flatten().tolist() for one in (moment.view.masked, moment.view.visible))
    scores = {c: moment.p(row, c) for c in masked} | {c: moment.p(row, c, moment.shown) for c in visible}
    number = len(visible) + int(moment.view.quota[row])
    return set(visible) - set(sorted(scores, key=lambda c: -scores[c])[:number])


def likelier(moment: Moment, row: int, threshold: float) -> set[int]:
    """Tokens that are not the likeliest, where the likeliest is above the threshold; the surest of these first."""
    wrong = [
        (-moment.p(row, c), c)
        for c in moment.view.visible[row].nonzero().flatten().tolist()
        if moment.log_probs[row, c].argmax() != moment.shown[row, c] and moment.p(row, c) > threshold
    ]
    return {c for _, c in sorted(wrong)[: int(moment.view.limit[row])]}


def llada21(moment: Moment, row: int, threshold: float) -> set[int]:
    """Tokens from which the proposal differs, if it is above the threshold."""
    return {
        c
        for c in moment.view.visible[row].nonzero().flatten().tolist()
        if moment.sampled[row, c] != moment.shown[row, c] and moment.p(row, c, moment.sampled) > threshold
    }


RULES = {
    "confidence": lambda moment, row: wino(moment, row, 0.3),
    "self_planning": p2,
    "edit": lambda moment, row: likelier(moment, row, 0.35),
    "sampled_edit": lambda moment, row: llada21(moment, row, 0.35),
}


def test_rules_are_those_of_the_papers():
    config = DecodingConfig(9, revision_threshold=0.3, edit_threshold=0.35)
    for name, rule in RULES.items():
        sizes = Counter()
        for seed in range(5):
            moment = random_moment(seed, config=config)
            selected = REVISIONS[name].select(moment.view)
            for row in range(len(selected)):
                expected = rule(moment, row)
                assert set(selected[row].nonzero().flatten().tolist()) == expected
                sizes[len(expected)] += 1
        assert sizes[0] and max(sizes) >= 2  # none, one and several
    assert {name for name, way in REVISIONS.items() if way.edits} == {"edit", "sampled_edit"}
    assert {*RULES, "random"} == set(REVISIONS)


@pytest.mark.parametrize("cap", [0.05, 0.4, 1.0])
def test_random_erasures_have_the_probability_of_the_paper(cap):
    """
    ReMDM-cap: sigma = min(cap, (1 - alpha_s) / alpha_t), with the shares of visible tokens before and after the step. Each token
    on its own, so the expected number is sigma times the number of visible tokens.
    """
    moment = random_moment(0, rows=30, config=DecodingConfig(9, revision_rate=cap))
    repeats = 2000
    view = replace(
        moment.view,
        **{name: value.repeat(repeats, *[1] * (value.dim() - 1)) for name, value in vars(moment.view).items()
           if isinstance(value, Tensor)},
    )  # fmt: skip
    view.uniforms = torch.rand(view.visible.shape, generator=torch.Generator().manual_seed(1))
    selected = REVISIONS["random"].select(view).view(repeats, 30, 9)
    rates = []
    for row in range(30):
        visible, masked = int(moment.view.visible[row].sum()), int(moment.view.masked[row].sum())
        assert not selected[:, row][:, ~moment.view.visible[row]].any()
        if not visible:
            continue
        alpha_t = visible / (visible + masked)
        alpha_s = (visible + int(moment.view.quota[row])) / (visible + masked)
        sigma = min(cap, (1 - alpha_s) / alpha_t)
        each = selected[:, row][:, moment.view.visible[row]].double()
        assert ((each.mean(0) - sigma).abs() <= 4.5 * (sigma * (1 - sigma) / repeats) ** 0.5 + 1e-6).all()
        assert abs(each.sum(1).mean() - visible * sigma) <= 4.5 * (visible * sigma / repeats) ** 0.5 + 1e-6
        if visible > 1 and 0 < sigma < 1:  # independently of each other
            both = (each[:, 0] * each[:, 1]).mean()
            assert abs(both - sigma**2) <= 4.5 * (sigma**2 / repeats) ** 0.5
        rates.append(sigma)
    assert min(rates) == 0 and (cap == 1 or max(rates) == cap)


# ------------------------------------------------------------------------------------------------- the rules, in the loop


@dataclass
class Looked:
    """What a published decoder sees before a step: probabilities of each position of the region, `(positions, V)`, the canvas,
    and the masked positions and those whose token may be taken back."""

    probs: dict[int, Tensor]
    proposals: dict[int, int]
    canvas: list[int]
    masked: list[int]
    visible: list[int]

    def best(self, position: int) -> float:
        return self.probs[position].max().item()

    def shown(self, position: int) -> float:
        return self.probs[position][self.canvas[position]].item()


Rule = Callable[
    [Looked, int], tuple[set[int], set[int]]
]  # what is filled, and what is taken back; the schedule's number


def surest(look: Looked, number: int) -> set[int]:
    return set(sorted(look.masked, key=lambda position: -look.best(position))[:number])


def wino_loop(threshold: float, most: int) -> Rule:
    def rule(look: Looked, number: int):
        ranked = sorted((look.shown(position), position) for position in look.visible)
        erased = {position for p, position in ranked[:most] if p < threshold}
        return surest(look, number + len(erased)), erased

    return rule


def p2_loop(look: Looked, number: int):
    scores = {p: look.best(p) for p in look.masked} | {p: look.shown(p) for p in look.visible}
    stay = set(sorted(scores, key=lambda position: -scores[position])[: len(look.visible) + number])
    return stay & set(look.masked), set(look.visible) - stay


def edit_loop(threshold: float, most: int) -> Rule:
    def rule(look: Looked, number: int):
        wrong = [
            (-look.best(position), position)
            for position in look.visible
            if look.probs[position].argmax() != look.canvas[position] and look.best(position) > threshold
        ]
        return surest(look, number), {position for _, position in sorted(wrong)[:most]}

    return rule


def llada21_loop(fill: float, change: float) -> Rule:
    """Fill what is proposed with more than `fill`, or else the surest; replace what a proposal differs from with more than
    `change`."""

    def rule(look: Looked, number: int):
        proposed = {position: look.probs[position][token].item() for position, token in look.proposals.items()}
        high = {position for position in look.masked if proposed[position] > fill}
        surest = sorted(look.masked, key=lambda position: -proposed[position])[:number]
        changed = {
            position
            for position in look.visible
            if look.proposals[position] != look.canvas[position] and proposed[position] > change
        }
        return high if len(high) >= number else set(surest), changed

    return rule


def published(policy, spec, prompt, config: DecodingConfig, rule: Rule, proposals: list[list[int]]) -> list[tuple]:
    """
    The loop of a decoder that takes tokens back, without a cache, one response alone. `proposals` are the tokens that were sampled
    at each step, of all positions that it looks at.

    Returns:
        Region, step, position and token (`None`: erased) of each event.
    """
    edits, steps, proposals = config.revising.edits, config.steps_per_block, iter(proposals)
    tail = len(prompt) % spec.block_size if spec.block_origin == "sequence" else 0
    blocks = math.ceil((tail + config.max_new_tokens) / spec.block_size)
    size = blocks * spec.block_size - tail
    canvas, counts, events = [MASK] * size, [0] * size, []
    taken = Counter()
    for block in range(blocks):
        last = (block + 1) * spec.block_size - tail
        region = range(0 if spec.attention == "full" else max(last - spec.block_size, 0), last)
        own = region_of(spec, len(prompt), last - 1)
        filled, done, after, total = False, 0, 0, None
        while True:
            masked = [position for position in region if canvas[position] == MASK]
            first = [position for position in masked if is_autoregressive(spec, len(prompt), position)]
            if total is None and not first:
                total = len(masked)
            end = sequence_end(spec, len(prompt), size, own)
            probs = log_distributions(policy, spec, len(prompt), [(prompt + canvas)[:end]])[0].exp()
            probs[:, MASK] = 0.0  # it may have a share, but is never proposed
            left = None if steps is None else steps - done
            enough = left is None or left >= (1 if edits else 2)
            if config.revision_steps is not None and filled:
                enough &= config.revision_steps - after >= (1 if edits else 2)
            visible = [
                position
                for position in region
                if canvas[position] != MASK and counts[position] < config.revision_limit and enough
                and not is_autoregressive(spec, len(prompt), position)
            ]  # fmt: skip
            if first:
                masked, visible = first, []
            places = sorted([*masked, *visible])
            look = Looked(
                {position: probs[read_at(spec, len(prompt), position)] for position in places},
                dict(zip(places, next(proposals), strict=True)),
                canvas,
                masked,
                visible,
            )
            fill = None if steps is None else math.ceil(config.fill_share * steps)
            if first:
                number = 1
            elif filled or (fill is not None and done >= fill - 1):
                number = len(masked)
            else:
                number = config.tokens_per_step if fill is None else total // fill + (done < total % fill)
            written, back = rule(look, number)
            erased = set() if edits else back
            step = sum(taken.values()) if spec.attention == "full" else taken[own]
            here = {position: look.proposals[position] for position in written | (back if edits else set())}
            events += [(own, step, position, token) for position, token in here.items()]
            events += [(own, step, position, None) for position in erased]
            for position in back:
                counts[position] += 1
            canvas = [
                MASK if position in erased else here.get(position, token) for position, token in enumerate(canvas)
            ]
            taken[own if spec.attention == "block" else 0] += bool(written or back)
            done += not first
            full = all(canvas[position] != MASK for position in region)
            after += filled
            ended = full and filled and not back
            filled |= full
            if full and not ended:  # what is left is not enough to take something back
                needed = 1 if edits else 2
                ended |= steps is not None and steps - done < needed
                ended |= config.revision_steps is not None and config.revision_steps - after < needed
            if ended:
                break
        if any(token in spec.stop_token_ids for token in canvas):
            break
    assert next(proposals, None) is None  # no step more
    return sorted(events, key=lambda event: event[:3])


LOOPS: dict[str, tuple[Rule, dict]] = {
    "wino": (wino_loop(0.5, 2), {"revision": "confidence", "revision_threshold": 0.5, "revision_max": 2, "tokens_per_step": 2}),
    "wino, scheduled": (
        wino_loop(0.8, 3),
        {"revision": "confidence", "revision_max": 3, "steps_per_block": 6, "fill_share": 0.4, "revision_limit": 3},
    ),
    "wino, a few more steps": (
        wino_loop(0.9, 3),
        {"revision": "confidence", "revision_threshold": 0.9, "revision_max": 3, "revision_steps": 3, "tokens_per_step": 3},
    ),
    "p2": (p2_loop, {"revision": "self_planning", "tokens_per_step": 2, "revision_limit": 5}),
    "p2, scheduled": (p2_loop, {"revision": "self_planning", "steps_per_block": 5, "fill_share": 1.0, "revision_limit": 5}),
    "edit": (edit_loop(0.4, 2), {"revision": "edit", "edit_threshold": 0.4, "revision_max": 2}),
    "llada 2.1": (
        llada21_loop(0.95, 0.9),
        {
            "revision": "sampled_edit", "strategy": "sampled_threshold", "threshold": 0.95, "edit_threshold": 0.9,
            "revision_steps": 16, "revision_limit": 1000,
        },
    ),
}  # fmt: skip


PUBLISHED = {
    "block-from-sequence": 6, "block-from-response": 4, "shift-autoregressive-first": 5, "mask-predicted": 6, "full": 6,
    "full-shift": 11,
}  # fmt: skip


@pytest.fixture
def sampled(monkeypatch):
    """The tokens that each step proposed."""
    found: list[list[int]] = []
    original = loop.propose

    def propose(*args):
        proposal = original(*args)
        found.append(proposal.tokens.tolist())
        return proposal

    monkeypatch.setattr(loop, "propose", propose)
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("way", LOOPS)
@torch.no_grad()
def test_published_decoders(sampled, way, temperature):
    """The same writes and erasures at the same steps, with block and full attention, from both origins, with and without a shift
    of tokens and an autoregressive first token."""
    rule, options = LOOPS[way]
    config = DecodingConfig(11, temperature, **options)
    seen = Counter()
    for name, size in PUBLISHED.items():
        spec = spec_of(name, block_size=size)
        policy = make_policy(spec, num_hidden_layers=2)
        policy.get_output_embeddings().weight.mul_(2.0)  # sure of some tokens
        for seed, prompt in enumerate(make_prompts((3, 6), seed=5)):
            sampled.clear()
            batch = decode(policy, [prompt], config, spec, seeds=[seed])
            events = [(e.region, e.step, e.position, e.token) for e in events_of(spec, batch, 0)]
            assert events == published(policy, spec, prompt, config, rule, sampled)
            writes = Counter(position for _, _, position, token in events if token is not None)
            seen[min(max(writes.values()), 3)] += 1
    assert sum(seen[number] for number in (2, 3)) >= 4, seen  # tokens were taken back


@torch.no_grad()
def test_random_erasures_in_the_loop(sampled):
    """Whatever was erased, the schedule says by how many the visible tokens grow."""
    drawn: list[set[int]] = []

    def remember(view):
        selected = REVISIONS["random"].select(view)
        drawn.append(set(selected[0].nonzero().flatten().tolist()))
        return selected

    seen = 0
    for name in ("block-from-response", "full"):
        spec = spec_of(name, block_size=8)
        policy = make_policy(spec, num_hidden_layers=2)
        config = DecodingConfig(
            16, 1.0, tokens_per_step=2, revision=Revising(remember), revision_rate=0.4, revision_limit=9
        )
        for seed in range(3):
            sampled.clear()
            drawn.clear()
            batch = decode(policy, [[7, 8, 9]], config, spec, seeds=[seed])
            chosen = iter(drawn)

            def rule(look: Looked, number: int, spec=spec, chosen=chosen):
                start = 0 if spec.attention == "full" else min([*look.masked, *look.visible]) // 8 * 8
                erased = {start + column for column in next(chosen)}
                return surest(look, number + len(erased)), erased

            events = [(e.region, e.step, e.position, e.token) for e in events_of(spec, batch, 0)]
            assert events == published(policy, spec, [7, 8, 9], config, rule, sampled)
            seen += sum(token is None for *_, token in events)
    assert seen > 5


# ------------------------------------------------------------------------------------- what must not change a response


WAYS = {
    "confidence": {"revision": "confidence", "tokens_per_step": 2},
    "random": {"revision": "random", "revision_rate": 0.5, "strategy": "random"},
    "edit": {"revision": "edit", "edit_threshold": 0.2, "steps_per_block": 5},
    "sampled_edit": {"revision": "sampled_edit", "edit_threshold": 0.1, "revision_steps": 3},
    "self_planning": {"revision": "self_planning", "tokens_per_step": 3, "strategy": "entropy"},
}


def assert_same_response(spec, one: TrajectoryBatch, row: int, other: TrajectoryBatch, index: int) -> None:
    found, expected = events_of(spec, other, index), events_of(spec, one, row)
    assert [replace(event, column=0) for event in found] == [replace(event, column=0) for event in expected]
    logps = [torch.cat([batch.logps, batch.revisions.logps], 1)[at] for batch, at in ((one, row), (other, index))]
    columns = [[event.column for event in events if event.token is not None] for events in (expected, found)]
    assert_close(logps[1][columns[1]], logps[0][columns[0]])
    for name in ("canvas_lengths", "completion_lengths"):
        assert getattr(one, name)[row] == getattr(other, name)[index]


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_neighbours_order_and_batch_size_do_not_matter(spec, options):
    spec = spec.replace(predicts_visible_tokens=True, stop_token_ids=STOPS)
    policy = make_policy(spec)
    config = DecodingConfig(20, 1.0, **options)
    prompts, seeds = make_prompts((3, 8, 13, 21)), [7, 8, 9, 10]
    before = torch.random.get_rng_state()
    together = decode(policy, prompts, config, spec, seeds)
    assert torch.equal(before, torch.random.get_rng_state())
    order = [2, 0, 3, 1]
    for size in (None, 1, 2):
        shuffled = decode(
            policy, [prompts[i] for i in order], config, spec, [seeds[i] for i in order], batch_size=size
        )
        for place, row in enumerate(order):
            assert_same_response(spec, together, row, shuffled, place)
    alone = decode(policy, prompts[1:2], config, spec, seeds[1:2])
    assert_same_response(spec, together, 1, alone, 0)
    other = decode(policy, prompts, config, spec, [seed + 50 for seed in seeds])
    assert other.completions() != together.completions()


def never(view: ReviseView) -> Tensor:
    return torch.zeros_like(view.visible)


@pytest.mark.parametrize("name", ["block-from-sequence", "shift-autoregressive-first", "full"])
def test_a_strategy_that_takes_nothing_back_decodes_as_none_does(name):
    """The same tokens at the same steps, apart from where steps are counted from."""
    spec = spec_of(name)
    policy, prompts = make_policy(spec), make_prompts((3, 8, 13))
    config = DecodingConfig(19, strategy="threshold", threshold=0.3, stop_rule="block")
    plain = decode(policy, prompts, config, spec)
    for edits in (False, True):
        found = decode(policy, prompts, replace(config, revision=Revising(never, edits)), spec)
        assert found.revisions is not None and found.revisions.steps.shape == (3, 0) and plain.revisions is None
        for field in ("canvas_ids", "canvas_lengths", "completion_lengths"):
            assert torch.equal(getattr(found, field), getattr(plain, field)), field
        assert_close(found.logps, plain.logps)
        assert torch.equal(found.steps, plain.steps) or spec.attention == "full"
        assert torch.equal(found.steps[:, :8], plain.steps[:, :8])


def test_the_options_of_revision_change_nothing_without_it():
    spec = SPECS["block-from-sequence"]
    policy, prompts = make_policy(spec), make_prompts((3, 8))
    more = {
        "revision_threshold": 0.1, "edit_threshold": 0.1, "revision_rate": 0.9, "revision_max": 1, "revision_limit": 1,
        "revision_steps": 1, "fill_share": 0.1,
    }  # fmt: skip
    config = DecodingConfig(19, 1.0, steps_per_block=5)
    plain, found = (decode(policy, prompts, one, spec, [1, 2]) for one in (config, replace(config, **more)))
    assert torch.equal(found.canvas_ids, plain.canvas_ids) and torch.equal(found.logps, plain.logps)
    assert torch.equal(found.steps, plain.steps) and found.revisions is None


# --------------------------------------------------------------------------------------------------------- where it ends


def count_passes(policy, prompt, config, spec, seed) -> tuple[TrajectoryBatch, list[tuple[int, int]]]:
    """A response, and for each pass its block and how many positions are masked after it."""
    passes = []

    def on_step(at):
        (lane,) = at.active_lanes()
        passes.append((lane.block, sum(masked for _, masked in at.canvas(lane.row))))

    return decode(policy, [prompt], config, spec, [seed], on_step=on_step), passes


SCHEDULED = ("confidence", "sampled_confidence", "entropy", "margin", "random", "left_to_right")


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_every_response_ends_and_is_whole(name):
    """
    Random settings: a position is written at most once more than it may be taken back, blocks have no more passes than they
    may, nothing is masked in the end, and prompts and autoregressive tokens are never touched.
    """
    rng, spec = random.Random(name), spec_of(name)
    spec = spec.replace(block_size=min(spec.block_size, 6))
    policy, seen = make_policy(spec, num_hidden_layers=1), Counter()
    ways: list = [*REVISIONS, Revising(lambda view: view.visible), Revising(lambda view: view.visible, edits=True)]
    for seed in range(25):
        strategy = rng.choice(sorted(STRATEGIES))
        steps = None if strategy == "entropy_bound" else rng.choice([None, 1, 2, 5])
        config = DecodingConfig(
            rng.randint(1, 13),
            rng.choice([0.0, 1.0, 2.0]),
            strategy=strategy,
            tokens_per_step=rng.randint(1, 4) if steps is None else 1,
            threshold=0.2,
            entropy_bound=rng.choice([0.1, 3.0]),
            steps_per_block=steps,
            schedule=rng.choice(["even", "linear"]),
            sub_block_size=rng.choice([None, None, 2]),
            stop_rule=rng.choice(["block", "token"]),
            revision=rng.choice(ways),
            revision_threshold=0.9,
            edit_threshold=0.1,
            revision_rate=0.5,
            revision_max=rng.choice([None, 1, 5]),
            revision_limit=rng.randint(1, 3),
            revision_steps=rng.choice([None, 1, 2, 4]),
            fill_share=rng.choice([0.3, 0.5, 1.0]),
        )
        prompt = make_prompts((rng.randint(1, 9),), seed)[0]
        batch, passes = count_passes(policy, prompt, config, spec, seed)
        assert batch.prompt_ids[0].tolist() == prompt
        events, size = events_of(spec, batch, 0), int(batch.canvas_lengths[0])
        writes = Counter(event.position for event in events if event.token is not None)
        reached = [position for position in range(size) if position in writes]
        assert reached == list(range(len(reached)))
        assert (batch.steps[0, : len(reached)] >= 0).all() and not batch.canvas_ids[0, : len(reached)].eq(MASK).any()
        assert max(writes.values()) <= config.revision_limit + 1
        seen["taken back"] += max(writes.values()) > 1
        assert all(writes[p] == 1 for p in reached if is_autoregressive(spec, len(prompt), p))
        ids = batch.canvas_ids[0, : len(reached)].tolist()
        stops = [position for position in range(min(len(ids), config.max_new_tokens)) if ids[position] in STOPS]
        assert batch.completion_lengths[0] == (stops[0] + 1 if stops else min(config.max_new_tokens, len(reached)))
        assert stops or len(reached) >= config.max_new_tokens or any(token in STOPS for token in ids)
        if strategy not in SCHEDULED or config.sub_block_size is not None:
            continue
        for block in {block for block, _ in passes}:
            left = [masked for number, masked in passes if number == block]
            assert left[-1] == 0
            first = any(
                is_autoregressive(spec, len(prompt), p) for p in writes if block_number(spec, prompt, p) == block
            )
            if config.steps_per_block is not None:
                assert len(left) - first <= config.steps_per_block
            if config.revision_steps is not None:
                assert len(left) - 1 - left.index(0) <= config.revision_steps
                seen["limited"] += 1
    assert seen["taken back"] >= 5 or spec.block_size == 1
    assert seen["limited"] >= 3


def block_number(spec, prompt: list[int], position: int) -> int:
    tail = len(prompt) % spec.block_size if spec.block_origin == "sequence" else 0
    return (tail + position) // spec.block_size


def test_steps_that_are_left_are_not_spent_on_nothing():
    """A pass that could take nothing back, and has nothing to write, is not made."""
    spec = spec_of("full", block_size=8, stop_token_ids=())
    policy = make_policy(spec, num_hidden_layers=1)
    everything = Revising(lambda view: view.visible)
    for steps, fill, expected in ((4, 0.5, 4), (4, 1.0, 4), (2, 0.5, 1), (1, 0.5, 1), (6, 0.5, 6)):
        config = DecodingConfig(8, revision=everything, steps_per_block=steps, fill_share=fill, revision_limit=100)
        assert len(count_passes(policy, [7], config, spec, 0)[1]) == expected
    nothing = DecodingConfig(8, revision=Revising(never), steps_per_block=6)
    assert len(count_passes(policy, [7], nothing, spec, 0)[1]) == 4  # three that fill, one that looks
    few = DecodingConfig(8, revision=Revising(never), steps_per_block=4, fill_share=0.75)
    assert len(count_passes(policy, [7], few, spec, 0)[1]) == 3  # one more could only write


@pytest.mark.parametrize("revision", ["confidence", "random"])
def test_revision_steps_begin_when_the_block_is_filled(revision):
    """Until then tokens are taken back, even if no step is left for it afterwards."""
    spec = spec_of("full", block_size=8, stop_token_ids=())
    policy = make_policy(spec, num_hidden_layers=1)
    config = DecodingConfig(8, 1.0, revision=revision, revision_threshold=1.0, revision_rate=0.9, revision_steps=1)
    batch, passes = count_passes(policy, [7], config, spec, 0)
    assert (batch.revisions.steps >= 0).any()
    assert [masked for _, masked in passes].index(0) == len(passes) - 1


# --------------------------------------------------------------------------------------------------- strategies of users


def test_a_strategy_of_a_user():
    """It erases or writes over what it selects, with random numbers of its own at temperature 0 as well."""
    spec = spec_of("block-from-response", stop_token_ids=())
    policy, seen = make_policy(spec, num_hidden_layers=1), []

    def leftmost(view: ReviseView) -> Tensor:
        seen.append(view.uniforms)
        assert not (view.masked & view.visible).any()
        places = torch.arange(view.visible.shape[1], dtype=torch.float).expand(view.visible.shape)
        return view.first(places, view.visible, torch.ones_like(view.limit))

    for edits in (False, True):
        config = DecodingConfig(8, revision=Revising(leftmost, edits=edits), revision_limit=1, tokens_per_step=4)
        assert config.to_dict()["revision"].endswith("leftmost")
        batch = decode(policy, [[7, 8]] * 2, config, spec, seeds=[1, 2])
        events = events_of(spec, batch, 0)
        gone = Counter(event.position for event in events if event.token is None)
        writes = Counter(event.position for event in events if event.token is not None)
        assert writes == dict.fromkeys(range(8), 2)
        assert gone == ({} if edits else dict.fromkeys(range(8), 1))
        assert all(one is not None and not torch.equal(one[0], one[1]) for one in seen if len(one) == 2)
        seen.clear()
        assert decode(policy, [[7, 8]], config, spec).completions() == batch.completions()[:1]
        assert seen.pop() is None
        seen.clear()


@pytest.mark.parametrize("returned", [lambda view: view.visible.long(), lambda view: view.visible[:, :-1]])
def test_a_strategy_that_returns_something_else(returned):
    spec = spec_of("block-from-response")
    config = DecodingConfig(8, revision=Revising(returned))
    with pytest.raises(
        ValueError, match=r"The revising strategy '.*lambda.*' must return a boolean tensor .*\(1, 8\); got"
    ):
        decode(make_policy(spec, num_hidden_layers=1), [[7]], config, spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revision": "remask"}, "`revision` must be one of .*'confidence'.*'remask'"),
        ({"revision": never}, "`revision`"),
        ({"revision_threshold": 1.5}, "`revision_threshold`"),
        ({"edit_threshold": -0.1}, "`edit_threshold`"),
        ({"revision_rate": 2.0}, "`revision_rate`"),
        ({"revision_max": 0}, "`revision_max`"),
        ({"revision_limit": 0}, "`revision_limit`"),
        ({"revision_steps": 0}, "`revision_steps`"),
        ({"fill_share": 0.0}, "`fill_share`"),
        (
            {"revision": "confidence", "approximate_cache": "prefix"},
            "`revision` and `approximate_cache` do not go together",
        ),
        (
            {"revision": "confidence", "allow_mask_token": True, "steps_per_block": 4},
            "`revision` and `allow_mask_token` do not go together",
        ),
        (
            {"revision": "confidence", "strategy": "sampled_confidence", "score_selection": True, "sub_block_size": 2},
            "`revision` with `score_selection=True` needs `sub_block_size=None`",
        ),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(8, **options)


def test_writing_over_tokens_needs_a_policy_that_was_trained_for_it():
    for name, edits in itertools.product(
        ("full", "block-from-sequence"), ("edit", "sampled_edit", Revising(never, edits=True))
    ):
        spec = SPECS[name]
        policy, config = make_policy(spec, num_hidden_layers=1), DecodingConfig(8, revision=edits)
        with pytest.raises(ValueError, match="was not trained to predict visible tokens. Use `revision='confidence'`"):
            decode(policy, [[7]], config)
        decode(policy, [[7]], config, spec.replace(predicts_visible_tokens=True))


def test_random_erasures_need_seeds():
    spec = SPECS["full"]
    policy, config = make_policy(spec, num_hidden_layers=1), DecodingConfig(8, revision="random")
    with pytest.raises(ValueError, match="needs `seeds`"):
        decode(policy, [[7]], config)
    assert decode(policy, [[7]], config, seeds=[0]).revisions is not None
