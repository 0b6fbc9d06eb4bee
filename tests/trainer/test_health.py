"""Signs that a training breaks, by logs with known fluctuations and by trainings that do."""

import random

import pytest

from tests.offline.conftest import collection, start  # noqa: F401
from trl_diffusion import load_trajectories
from trl_diffusion.trainer.health import CERTAIN, FAR, LOGS, WINDOW, HealthCallback, moved_far, reward_fell, signs_of


def rewards(values) -> list[dict]:
    """A log with a reward in every second entry, as with two updates for each rollout."""
    return [entry for value in values for entry in ({"reward": value, "loss": 0.1}, {"loss": 0.1})]


def noise(seed: int, size: int) -> list[float]:
    """Of standard deviation 1."""
    generator = random.Random(seed)
    return [generator.gauss(0.0, 1.0) for _ in range(size)]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_a_fall_is_measured_in_standard_errors(scale):
    """CERTAIN standard errors of a difference of means of five are 5 (2 / 5)^0.5 standard deviations."""
    limit = CERTAIN * (2 / WINDOW) ** 0.5
    assert limit == pytest.approx(3.16, rel=1e-2)
    found = {}
    for fall in (0.0, limit / 2, 2 * limit):
        logs = [
            [scale * (value - fall * (step >= 20)) for step, value in enumerate(noise(seed, 30))] for seed in range(40)
        ]
        found[fall] = sum(reward_fell(rewards(values)) for values in logs)
    assert found[0.0] == 0 and found[limit / 2] <= 10 and found[2 * limit] == 40


def test_a_reward_that_fluctuates_or_rises_did_not_fall():
    for drift in (0.0, 0.1, 1.0):
        runs = [[value + drift * step for step, value in enumerate(noise(seed, 100))] for seed in range(20)]
        alarms = sum(any(reward_fell(rewards(run[:end])) for end in range(len(run) + 1)) for run in runs)
        assert alarms <= 1
    assert not reward_fell(rewards([1.0] * 40)) and not reward_fell([])
    assert not reward_fell(rewards([*[1.0] * 20, 0.9]))  # one of five


def test_what_is_long_past_does_not_count():
    """A reward that fell, and stays where it is."""
    fallen = [*(10.0 + value for value in noise(0, 20)), *noise(1, LOGS)]
    assert reward_fell(rewards(fallen[:35])) and not reward_fell(rewards(fallen))
    assert not reward_fell(rewards([5.0] * (WINDOW - 1) + [0.0] * WINDOW))  # too early to say


@pytest.mark.parametrize(("value", "far"), [(2 * FAR, True), (FAR / 2, False), (0.0, False), (None, False)])
def test_the_distance_of_the_last_update_counts(value, far):
    entry = {} if value is None else {"diffusion/kl_to_old": value}
    assert moved_far([{"diffusion/kl_to_old": 0.0}, entry]) == far
    assert not moved_far([])


@pytest.mark.parametrize(
    ("loss_type", "online", "names"),
    [("grpo", True, ["moved_far", "reward_fell"]), ("grpo", False, []), ("dpo", False, ["chosen_sinks"])],
)
def test_only_what_applies_is_watched(loss_type, online, names):
    assert [sign.__name__ for sign in signs_of(loss_type, online)] == names


def test_stored_responses_have_no_reward_to_fall(make_trainer, start, collection):  # noqa: F811
    trainer = make_trainer(str(start), dataset=load_trajectories(collection).select(range(2)), reward_funcs=None)
    (watching,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, HealthCallback)]
    assert watching.signs == []


@pytest.mark.parametrize("learning_rate", [1e-4, 0.1])
def test_the_log_warns_once(make_trainer, caplog, learning_rate):
    """Ten updates on the same responses, with a reward that tells them apart."""
    trainer = make_trainer(learning_rate=learning_rate, num_iterations=5, max_steps=10)
    trainer.train()
    distances = [log["diffusion/kl_to_old"] for log in trainer.state.log_history if "diffusion/kl_to_old" in log]
    assert (max(distances) > FAR) == (learning_rate == 0.1)
    assert caplog.text.count("the policy is far from the one that made the responses") == (learning_rate == 0.1)
