"""
The embedded task trained with every estimator for the same wall-clock time.

    python benchmarks/equal_time.py --seconds 180 --jobs 2 --json

Every run has the settings of `recipes/tiny_sudoku.yaml`, apart from the estimator and a learning rate that falls linearly
with time instead of updates. The clock runs while the trainer does (rollouts, rewards, updates) and stands still while
the policy is measured (200 evaluation puzzles, greedily). Runs have a thread each; `--jobs` of them go at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import TrainerCallback

from trl_diffusion import DTRPOConfig, DTRPOTrainer, tiny_policy_path
from trl_diffusion.tasks import load_task


RUNS = {
    "dtrpo": {"estimator": "dtrpo"},
    "exact": {"estimator": "exact"},
    "elbo": {"estimator": "elbo"},
    "mean_field": {"estimator": "mean_field"},
    "coupled": {"estimator": "coupled"},
}
LEARNING_RATE = 6e-4


class Clock(TrainerCallback):
    """Stops training when its time is up, lowers the learning rate with time, and measures the policy on the way."""

    def __init__(self, seconds: float, measurements: int, measure):
        self.seconds, self.measure = seconds, measure
        self.due = [seconds * (i + 1) / measurements for i in range(measurements)]
        self.elapsed, self.curve = 0.0, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.curve.append((0.0, 0, self.measure()))
        self.started = time.perf_counter()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        share = self.elapsed / self.seconds
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((state.global_step + 1) / 3, 1.0) * max(1 - share, 0.0)

    def on_step_end(self, args, state, control, **kwargs):
        self.elapsed += time.perf_counter() - self.started
        if self.due and self.elapsed >= self.due[0]:
            self.due = [due for due in self.due if due > self.elapsed]
            self.curve.append((self.elapsed, state.global_step, self.measure()))
        control.should_training_stop = self.elapsed >= self.seconds
        self.started = time.perf_counter()
        return control


def train(name: str, seed: int, seconds: float) -> list:
    torch.set_num_threads(1)
    task = load_task("sudoku", eval_size=200, seed=seed)
    with tempfile.TemporaryDirectory() as directory:
        trainer = DTRPOTrainer(
            model=tiny_policy_path(),
            reward_funcs=task.reward_funcs,
            args=DTRPOConfig(
                output_dir=directory, per_device_train_batch_size=512, num_generations=16, max_completion_length=17,
                tokens_per_step=2, max_steps=100_000, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
                beta=0.0, seed=seed, bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
                save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no", **RUNS[name],
            ),
            train_dataset=task.train,
        )  # fmt: skip

        def measure() -> float:
            return task.solve_rate(trainer.answer(task.evaluation["prompt"])[0])

        clock = Clock(seconds, 8, measure)
        trainer.add_callback(clock)
        trainer.train()
    return clock.curve


def plot(curves: dict[str, list], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for index, name in enumerate(RUNS):
        for number, curve in enumerate(curves[name]):
            axis.plot(
                [point[0] for point in curve],
                [100 * point[2] for point in curve],
                color=f"C{index}",
                alpha=0.8,
                label=name if number == 0 else None,
            )
    axis.set(xlabel="seconds of training", ylabel="sudokus solved greedily, %", title="equal wall-clock time, 3 seeds")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help="run this one only and print its curve")
    parser.add_argument("--plot", type=Path, default=Path(__file__).parent / "equal_time.png")
    parser.add_argument("--json", action="store_true", help="print all curves as one JSON object on the last line")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(train(args.one[0], int(args.one[1]), args.seconds)))
        return

    def run(pair: tuple[str, int]) -> list:
        name, seed = pair
        command = [sys.executable, __file__, "--seconds", str(args.seconds), "--one", name, str(seed)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(f"{name}, seed {seed}: {output.splitlines()[-1]}", flush=True)
        return json.loads(output.splitlines()[-1])

    pairs = [(name, seed) for seed in args.seeds for name in RUNS]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(pairs, pool.map(run, pairs), strict=True))
    curves = {name: [results[name, seed] for seed in args.seeds] for name in RUNS}
    print("| estimator | updates | solve rate at the end, by seed | mean |\n|---|---|---|---|")
    for name, runs in curves.items():
        rates = [curve[-1][2] for curve in runs]
        updates = statistics.mean(curve[-1][1] for curve in runs)
        print(
            f"| {name} | {updates:.0f} | {', '.join(f'{rate:.1%}' for rate in rates)} | {statistics.mean(rates):.1%} |"
        )
    plot(curves, args.plot)
    print(f"Plot: {args.plot}")
    if args.json:
        print(json.dumps(curves))


if __name__ == "__main__":
    main()
