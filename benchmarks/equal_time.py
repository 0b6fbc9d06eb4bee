"""
The embedded task trained for the same time in several ways: estimators, draws, decoding strategies, and rejection sampling.

    python benchmarks/equal_time.py --seconds 120 --jobs 2 --json
    python benchmarks/equal_time.py --runs dtrpo entropy sampled selection --seeds 0 1 2 3 4 --directory outputs/strategies
    python benchmarks/equal_time.py --runs dtrpo rejection rejection_4 --seconds 60 --jobs 1 --directory outputs/rejection

Every run has the settings of `recipes/tiny_sudoku.yaml`, apart from what `RUNS` says, its learning rate and its batch size. The
learning rate falls linearly with time instead of updates. Each kind of run has the learning rate and the batch size, of those
in `--learning_rates` and `--batch_sizes`, with which it solved most puzzles at its end with the seeds in `--choice_seeds`.
No other seed plays a part in the choice.

`rejection` generates 16 answers to each of as many puzzles as it can in 80 % of the time, and is fine-tuned on the best answer to each
puzzle in the rest of it (`trl-diffusion sft --trajectories`). `rejection_4` does so in four rounds, each with the policy of the round
before. An update of theirs is on an eighth of the batch size.

Time is that of a processor core (the run has one thread), so that what else a machine does matters less. The clock runs
while the trainer does (rollouts, rewards, updates) and stands still while the policy is measured (200 evaluation puzzles,
greedily). A run that is over is kept in `--directory`: the same command goes on where it stopped.
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
from datasets import Dataset, concatenate_datasets
from transformers import TrainerCallback

from trl_diffusion import (
    DecodingConfig,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    DTRPOConfig,
    DTRPOTrainer,
    collect,
    generate,
    load_trajectories,
    tiny_policy_path,
)
from trl_diffusion.policies.policy import open_policy
from trl_diffusion.sft.best import best_responses
from trl_diffusion.tasks import Task, load_task
from trl_diffusion.utils import half_width, write_text
from trl_diffusion.viz.colours import CURVES, css


RUNS = {
    "dtrpo": {},
    "uniform": {"step_distribution": "uniform"},
    "exact": {"estimator": "exact"},
    "elbo": {"estimator": "elbo"},
    "elbo_4": {"estimator": "elbo", "num_draws": 4},
    "mean_field": {"estimator": "mean_field"},
    "coupled": {"estimator": "coupled"},
    "entropy": {"strategy": "entropy"},
    "sampled": {"strategy": "sampled_confidence"},
    "selection": {"strategy": "sampled_confidence", "score_selection": True},
    "rejection": {},
    "rejection_4": {},
}
REJECTION = {"rejection": 1, "rejection_4": 4}  # rounds
COLLECTING = 0.8  # share of the time
LEARNING_RATE, BATCH_SIZE = 6e-4, 512


class Clock(TrainerCallback):
    """Stops training when its time is up, lowers the learning rate with time, and measures the policy on the way."""

    def __init__(self, seconds: float, measurements: int, learning_rate: float, measure):
        self.seconds, self.learning_rate, self.measure = seconds, learning_rate, measure
        self.due = [seconds * (i + 1) / measurements for i in range(measurements)]
        self.elapsed, self.curve = 0.0, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.curve.append((0.0, 0, self.measure()))
        self.started = time.process_time()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        share = self.elapsed / self.seconds
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate * min((state.global_step + 1) / 3, 1.0) * max(1 - share, 0.0)

    def on_step_end(self, args, state, control, **kwargs):
        self.elapsed += time.process_time() - self.started
        if self.due and self.elapsed >= self.due[0]:
            self.due = [due for due in self.due if due > self.elapsed]
            self.curve.append((self.elapsed, state.global_step, self.measure()))
        control.should_training_stop = self.elapsed >= self.seconds
        self.started = time.process_time()
        return control


def train(name: str, seed: int, seconds: float, learning_rate: float, batch_size: int) -> list:
    torch.set_num_threads(1)
    task = load_task("sudoku", eval_size=200, seed=seed)
    with tempfile.TemporaryDirectory() as directory:
        trainer = DTRPOTrainer(
            model=tiny_policy_path(),
            reward_funcs=task.reward_funcs,
            args=DTRPOConfig(
                output_dir=directory, per_device_train_batch_size=batch_size, num_generations=16, max_completion_length=17,
                tokens_per_step=2, max_steps=100_000, learning_rate=learning_rate, lr_scheduler_type="constant",
                beta=0.0, seed=seed, bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
                save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no", **RUNS[name],
            ),
            train_dataset=task.train,
        )  # fmt: skip

        def measure() -> float:
            return task.solve_rate(trainer.answer(task.evaluation["prompt"])[0])

        clock = Clock(seconds, 8, learning_rate, measure)
        trainer.add_callback(clock)
        trainer.train()
    return clock.curve


def best_of_16(
    policy, task: Task, first: int, seconds: float, directory: str, seed: int
) -> tuple[Dataset, int, float]:
    """
    The best answers to the puzzles from number `first` on, as many as fit into the time; the number of the next puzzle; and the
    seconds that it took.
    """
    decoding, stored = DecodingConfig(17, 1.0, tokens_per_step=2), []
    started = time.process_time()
    while not stored or time.process_time() - started < seconds:
        path = Path(directory, f"{seed}_{first}")
        rows = task.train.select(range(first, first + 32))
        collect(
            policy.model, policy.tokenizer, rows, task.reward_funcs, path, decoding, num_responses=16, batch_size=512,
            seed=seed, disable_tqdm=True,
        )  # fmt: skip
        stored.append(load_trajectories(path))
        first += 32
    return best_responses(concatenate_datasets(stored)), first, time.process_time() - started


def reject(name: str, seed: int, seconds: float, learning_rate: float, batch_size: int) -> list:
    """Rejection sampling, in rounds that take the same time."""
    torch.set_num_threads(1)
    task, policy = load_task("sudoku", eval_size=200, seed=seed), open_policy(tiny_policy_path())
    rounds, first, elapsed, steps = REJECTION[name], 0, 0.0, 0
    decoding = DecodingConfig(17, tokens_per_step=2)

    def measure() -> float:
        return task.solve_rate(generate(policy.model, policy.tokenizer, task.evaluation["prompt"], decoding).texts)

    curve = [(0.0, 0, measure())]
    with tempfile.TemporaryDirectory() as directory:
        for number in range(1, rounds + 1):
            due = seconds * number / rounds
            share = (due - elapsed) * COLLECTING
            best, first, used = best_of_16(policy, task, first, share, directory, seed)
            elapsed += used
            trainer = DiffusionSFTTrainer(
                model=policy.model,
                args=DiffusionSFTConfig(
                    directory, weighting="mean", per_device_train_batch_size=batch_size // 8, max_steps=100_000,
                    learning_rate=learning_rate, lr_scheduler_type="constant", seed=seed + 1000 * number, bf16=False,
                    gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
                    logging_strategy="no",
                ),
                train_dataset=best,
                processing_class=policy.tokenizer,
            )  # fmt: skip
            clock = Clock(max(due - elapsed, 1e-9), 1, learning_rate, measure)
            trainer.add_callback(clock)
            trainer.train()
            elapsed, steps = elapsed + clock.elapsed, steps + trainer.state.global_step
            curve.append((elapsed, steps, clock.curve[-1][2]))
    return curve


def plot(curves: dict[str, list], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    dashes = ("-", "--", "-.", ":")
    for index, (name, runs) in enumerate(curves.items()):
        for number, curve in enumerate(runs):
            axis.plot(
                [point[0] for point in curve],
                [100 * point[2] for point in curve],
                color=css(CURVES[index % len(CURVES)]),
                linestyle=dashes[index % len(dashes)],
                label=name if number == 0 else None,
            )
    axis.set(xlabel="seconds of one core", ylabel="sudokus solved greedily, %", title="equal time")
    axis.grid(alpha=0.3)
    axis.legend(handlelength=3)
    figure.savefig(path, dpi=150)


def interval(values: list[float]) -> str:
    """Mean of the seeds with its 95 % interval (Student's t), in points."""
    mean = 100 * statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    half = 100 * half_width(values)
    return f"{mean:.1f} +- {half:.1f}"


def table(curves: dict[str, list], settings: dict[str, tuple[float, int]]) -> str:
    """The runs beside the first one, seed by seed."""
    lines = [
        "| run | learning rate | batch | updates | solve rate at the end, by seed | mean, % | first run minus this one |",
        "|---|---|---|---|---|---|---|",
    ]
    best = [curve[-1][2] for curve in next(iter(curves.values()))]
    for name, runs in curves.items():
        rates = [curve[-1][2] for curve in runs]
        updates = statistics.mean(curve[-1][1] for curve in runs)
        ahead = interval([first - rate for first, rate in zip(best, rates, strict=True)])
        shown = ", ".join(f"{rate:.1%}" for rate in rates)
        setting = " | ".join(f"{value:g}" for value in settings[name])
        lines.append(f"| {name} | {setting} | {updates:.0f} | {shown} | {interval(rates)} | {ahead} |")
    return "\n".join(lines)


class Queue:
    """Runs in processes of their own, some at once. What is over is kept and not run again."""

    def __init__(self, seconds: float, jobs: int, directory: Path):
        self.seconds, self.jobs, self.directory = seconds, jobs, directory
        directory.mkdir(parents=True, exist_ok=True)

    def one(self, run: tuple[str, int, float, int]) -> list:
        kept = self.directory / "{0}_{4:g}s_seed{1}_lr{2:g}_batch{3}.json".format(*run, self.seconds)
        if not kept.is_file():
            command = [sys.executable, __file__, "--seconds", str(self.seconds), "--one", *map(str, run)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            write_text(kept, output.splitlines()[-1] + "\n")
        curve = json.loads(kept.read_text())
        print(f"{kept.stem}: {curve[-1]}", flush=True)
        return curve

    def all(self, runs: list[tuple[str, int, float, int]]) -> dict:
        """The curve of each run: `{run: curve}`, a run is (name, seed, learning rate, batch size)."""
        with ThreadPoolExecutor(self.jobs) as pool:
            return dict(zip(runs, pool.map(self.one, runs), strict=True))

    def choose(
        self, names: list[str], pairs: list[tuple[float, int]], seeds: list[int]
    ) -> dict[str, tuple[float, int]]:
        """The learning rate and the batch size that are best for each name, on average over the seeds."""
        if len(pairs) == 1:
            return dict.fromkeys(names, pairs[0])
        curves = self.all([(name, seed, *pair) for pair in pairs for seed in seeds for name in names])

        def solved(name: str, pair: tuple[float, int]) -> float:
            return statistics.mean(curves[name, seed, *pair][-1][2] for seed in seeds)

        for name in names:
            print(name, {f"{pair[0]:g}, {pair[1]}": f"{solved(name, pair):.1%}" for pair in pairs}, flush=True)
        return {name: max(pairs, key=lambda pair: solved(name, pair)) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument(
        "--runs", nargs="+", choices=RUNS, default=list(RUNS)[:7], metavar="RUN", help=f"of {list(RUNS)}"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[LEARNING_RATE], metavar="RATE")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[BATCH_SIZE], metavar="ANSWERS")
    parser.add_argument("--choice_seeds", type=int, nargs="+", default=[100, 101], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument(
        "--directory", type=Path, default=Path("outputs/equal_time"), help="where runs that are over are kept"
    )
    parser.add_argument("--one", nargs=4, metavar=("NAME", "SEED", "RATE", "ANSWERS"), help="one run: print its curve")
    parser.add_argument("--plot", type=Path, help="draw the curves to this file")
    parser.add_argument("--json", action="store_true", help="print all curves as one JSON object on the last line")
    args = parser.parse_args()
    if args.one:
        name, seed, rate, size = args.one
        run = reject if name in REJECTION else train
        print(json.dumps(run(name, int(seed), args.seconds, float(rate), int(size))))
        return

    queue = Queue(args.seconds, args.jobs, args.directory)
    pairs = [(rate, size) for rate in args.learning_rates for size in args.batch_sizes]
    settings = queue.choose(args.runs, pairs, args.choice_seeds)
    results = queue.all([(name, seed, *settings[name]) for seed in args.seeds for name in args.runs])
    curves = {name: [results[name, seed, *settings[name]] for seed in args.seeds] for name in args.runs}
    print(table(curves, settings))
    if args.plot:
        plot(curves, args.plot)
    if args.json:
        print(json.dumps({"settings": settings, "curves": curves}))


if __name__ == "__main__":
    main()
