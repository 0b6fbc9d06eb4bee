"""
What the score of a trajectory must count so that the expected gradient is the gradient of the expected reward (O13), and its
ratios have mean 1 (O14). All decodings of toy policies are enumerated, in float64. Rules that miss it have the errors that
docs/method.md states in sections 1 and 3.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.scoring.toys import Decoding, Event, Toy, compare, score
from trl_diffusion.decoding.config import DecodingConfig
from trl_diffusion.trajectories.trajectory import counted_writes


CELLS = 3
METHOD = Path(__file__).resolve().parents[2] / "docs" / "method.md"
# Rules that look at the policy's distributions, never at the token that was sampled.
BLIND = ("confidence", "threshold", "entropy", "entropy_bound", "margin", "random", "left_to_right")


def config(strategy: str, cells: int = CELLS, **settings) -> DecodingConfig:
    return DecodingConfig(cells, temperature=1.0, strategy=strategy, threshold=0.6, entropy_bound=1.2, **settings)


def until_settled(toy: Toy, decodings: list[Decoding]):
    """Writes of the completion, and those before the step that fills its last masked cell: what the package counts."""
    counted = counted_writes(toy.spec, toy.trajectories(decodings))

    def counts(row: int, event: Event) -> bool:
        length = len(decodings[row].completion)
        last = max(other.step for other in decodings[row].events if other.cell < length)
        by_definition = event.cell < length or event.step < last
        assert by_definition == counted[row, event.cell]
        return by_definition

    return counts


def of_the_completion(decodings: list[Decoding]):
    """Writes of the completion alone."""
    return lambda row, event: event.cell < len(decodings[row].completion)


@pytest.mark.parametrize("stop_rule", ["block", "token"])
@pytest.mark.parametrize("tokens_per_step", [1, 2])
@pytest.mark.parametrize("strategy", BLIND)
def test_o13_and_o14_hold_for_writes_until_the_completion_is_settled(strategy, tokens_per_step, stop_rule):
    old, new = Toy(CELLS, 0), Toy(CELLS, 1)
    decodings = old.decodings(config(strategy, tokens_per_step=tokens_per_step, stop_rule=stop_rule))
    chances = torch.stack([decoding.chance for decoding in decodings])
    assert chances.sum().item() == pytest.approx(1.0, rel=1e-12)
    counts = until_settled(old, decodings)
    error, _ = compare(old, decodings, score(decodings, counts))
    assert error <= 1e-10
    # The positions that the old policy picked are taken as given.
    log_ratios = score(new.replay(decodings), counts) - score(decodings, counts)
    assert (chances * log_ratios.exp()).sum().item() == pytest.approx(1.0, rel=1e-10)


def stated(about: str) -> tuple[float, float]:
    """The smallest and the largest relative error that a line of docs/method.md states."""
    (line,) = (line for line in METHOD.read_text().splitlines() if about in line)
    low, high = re.findall(r"0\.\d+", line)[:2]
    return float(low), float(high)


def test_writes_of_the_completion_alone_are_biased():
    """What is written after the stop token was visible while the completion was decoded."""
    low, high = stated("relative error of the gradient, random order")
    for seed in range(3):
        decodings = (toy := Toy(CELLS, seed)).decodings(config("random"))
        error, cosine = compare(toy, decodings, score(decodings, of_the_completion(decodings)))
        assert low <= error <= high and cosine < 0.999


@pytest.mark.parametrize("strategy", ["sampled_confidence", "sampled_threshold"])
def test_choosing_positions_by_the_sampled_token_is_biased(strategy):
    """Tokens that are kept because they are likely are no samples of the policy's distribution."""
    low, high = stated("relative error of the gradient, positions by the sampled token")
    for seed in range(3):
        decodings = (toy := Toy(CELLS, seed)).decodings(config(strategy))
        error, cosine = compare(toy, decodings, score(decodings, until_settled(toy, decodings)))
        assert low <= error <= high and cosine < 0.999
