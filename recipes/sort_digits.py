"""
A task and a reward function of one's own, for the embedded policy: it is to sort four digits, of which it has never been asked.
docs/howto/own_data.md explains it.

    trl-diffusion train --task recipes/sort_digits.py:make_task --config tiny_sudoku --max_completion_length 4 --tokens_per_step 1 \
        --num_draws 4 --output_dir outputs/sort_task
"""

import random

from datasets import Dataset

from trl_diffusion.tasks import Task


def right_places(completions, wanted, **kwargs):
    """The share of places that hold the right digit."""
    rewards = []
    for answer, right in zip(completions, wanted, strict=True):
        same = [a == b for a, b in zip(answer, right, strict=False)]
        rewards.append(sum(same) / len(right))
    return rewards


def sorted_digits(completions, wanted, **kwargs):
    """1 for the right answer, 0 for any other."""
    pairs = zip(completions, wanted, strict=True)
    return [float(answer == right) for answer, right in pairs]


def ask(number):
    """A row."""
    return {"prompt": f"sort {number}", "wanted": "".join(sorted(str(number)))}


def make_task(train_size, eval_size, seed):
    """The task. 500 numbers are measured, always the same ones."""
    numbers = random.Random(20260319).sample(range(1111, 9999), 8888)
    kept, others = numbers[:500], numbers[500:]
    random.Random(seed).shuffle(others)
    return Task(
        name="sort_digits",
        unit="numbers",
        train=Dataset.from_list([ask(one) for one in others[:train_size]]),
        evaluation=Dataset.from_list([ask(one) for one in kept[:eval_size]]),
        reward_funcs=[right_places],
        solved=sorted_digits,
        solution=lambda row: row["wanted"],
    )
