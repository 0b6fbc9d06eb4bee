"""
Signs in the log that a training breaks. They were found in runs that did: `trl-diffusion compare --study updates`, see
`docs/experiments.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback

from ..links import link


logger = get_logger(__name__)

WINDOW = 5  # logs whose means are compared
SUNK = -3.0  # implicit reward of the chosen responses, `beta` times log-ratio; good runs may reach -2
FAR = 0.2  # nats per token from the policy that made the responses; good runs reached 0.12, and those that broke 0.2 to 9
LOGS = 50  # the last logs, among which rewards are compared
CERTAIN = 5.0  # standard errors; rewards that only fluctuate show such a fall in 1 or 2 of 100 runs of 200 logs
_NOISE = 1.128  # mean distance of two values with a normal distribution of standard deviation 1

Log = dict[str, Any]


def chosen_sinks(history: Sequence[Log]) -> bool:
    """
    Whether the better responses become less likely while more pairs are in the right order. The loss then falls only because
    the worse responses become unlikely faster, and the policy forgets both.

    Args:
        history (`Sequence[dict]`): the log so far. Entries without metrics of pairs do not count.

    Returns:
        `bool`: whether all of these hold for the mean over the last [`WINDOW`] logs. The reward of the chosen responses is
        below [`SUNK`]. It is lower than in the logs before. More pairs are in the right order than in the first logs.
    """
    known = [log for log in history if log.get("rewards/chosen") is not None]
    if len(known) < 2 * WINDOW:
        return False

    def mean(name: str, logs: Sequence[Log]) -> float:
        return fmean(log[name] for log in logs)

    first, before, last = known[:WINDOW], known[-2 * WINDOW : -WINDOW], known[-WINDOW:]
    reward = mean("rewards/chosen", last)
    sinks = reward < SUNK and reward < mean("rewards/chosen", before)
    return sinks and mean("rewards/accuracies", last) > mean("rewards/accuracies", first)


def moved_far(history: Sequence[Log]) -> bool:
    """
    Whether the policy of the last update is far from the one that made its responses, so that their rewards say little about it.

    Args:
        history (`Sequence[dict]`): the log so far.

    Returns:
        `bool`: whether `diffusion/kl_to_old` of the last log is above [`FAR`].
    """
    return bool(history) and (history[-1].get("diffusion/kl_to_old") or 0.0) > FAR


def reward_fell(history: Sequence[Log]) -> bool:
    """
    Whether the reward is lower than it was, by more than it fluctuates from one log to the next.

    Args:
        history (`Sequence[dict]`): the log so far. Entries without a reward do not count.

    Returns:
        `bool`: among the last [`LOGS`] rewards, whether each of the last [`WINDOW`] is below the highest mean of [`WINDOW`]
        before them, and their mean by more than [`CERTAIN`] standard errors of this difference. The standard deviation of a
        reward is estimated from the distances of neighbours, which a trend does not enlarge much.
    """
    rewards = [log["reward"] for log in history if log.get("reward") is not None][-LOGS:]
    if len(rewards) < 2 * WINDOW:
        return False
    means = [fmean(rewards[first : first + WINDOW]) for first in range(len(rewards) - WINDOW + 1)]
    best = max(means[:-WINDOW])
    deviation = fmean(abs(after - before) for before, after in pairwise(rewards)) / _NOISE
    return best - means[-1] > CERTAIN * deviation * (2 / WINDOW) ** 0.5 and best > max(rewards[-WINDOW:])


Sign = Callable[[Sequence[Log]], bool]
_MEANINGS: dict[Sign, str] = {
    chosen_sinks: f"`rewards/chosen` is below {SUNK:g} and falls while `rewards/accuracies` is higher than at first: the better "
    "responses become less likely, too, and the policy may forget how to answer. Give 'sft' in `dpo_loss_type` a larger weight "
    "(`dpo_loss_weights`), or lower `learning_rate` or `beta`.",
    moved_far: f"`diffusion/kl_to_old` is above {FAR:g}: the policy is far from the one that made the responses, and may forget how to "
    "answer. Lower `learning_rate`, or train on each response fewer times (`num_iterations`).",
    reward_fell: f"`reward` is lower than it was, by more than {CERTAIN:g} standard errors. If the prompts have not become harder, the "
    "policy forgets: go on from an earlier checkpoint with a lower `learning_rate`, or set `beta`.",
}


def signs_of(loss_type: str, online: bool) -> list[Sign]:
    """
    The signs that mean something in a training.

    Args:
        loss_type (`str`): the loss.
        online (`bool`): whether the responses are new. The reward of stored ones says nothing about the policy.
    """
    if loss_type == "dpo":
        return [chosen_sinks]
    return [moved_far, reward_fell] if online else []


class HealthCallback(TrainerCallback):
    """
    Warns if a training breaks, once for each sign.

    Args:
        signs (`Sequence[Callable]`): functions of the log ([`~trainer.health.signs_of`]). [`DTRPOTrainer`] adds those that apply.
    """

    def __init__(self, signs: Sequence[Sign]):
        self.signs = list(signs)

    def on_log(self, args, state, control, **kwargs):
        for sign in [sign for sign in self.signs if sign(state.log_history)]:
            self.signs.remove(sign)
            where = link("docs/troubleshooting.md#the-policy-forgets")
            logger.warning(f"At optimizer step {state.global_step}, {_MEANINGS[sign]} See {where}.")
