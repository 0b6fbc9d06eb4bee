"""
How good each estimator's log-ratio is, and what it costs, as the embedded policy learns sudoku.

    python benchmarks/estimators.py --json

The policy is trained with `recipes/tiny_sudoku.yaml`'s settings. For `n` in 0, 50 and 200 updates, responses are decoded
by the policy after `n` updates, and the log-ratio of the policy 10 updates later to it is estimated: what an off-policy
update has to estimate. `exact` is the whole trajectory. Columns, over all responses and 16 estimates of each:

- bias, std: mean error, and standard deviation of an estimate around its own mean, in nats;
- spread: standard deviation of the exact log-ratio over responses, for comparison;
- correlation: of estimates with exact values;
- passes: forward passes per response; ms, MiB: forward and backward, time and peak memory, per response.

Memory is measured in a process of its own, which loads stored responses, makes a small update first so that all code is
loaded, and then one of 64 responses: the peak of its resident set (Linux: `VmHWM`, which is reset before) minus what was
resident just before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_diffusion import DecodingConfig, DTRPOConfig, DTRPOTrainer, decode, get_spec, tiny_policy_path
from trl_diffusion.scoring.diagnostics import estimate_quality
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score
from trl_diffusion.seeds import derive_seed
from trl_diffusion.tasks import load_task
from trl_diffusion.trajectories.trajectory import TrajectoryBatch
from trl_diffusion.viz.colours import CURVES, css


POINTS, LATER = (0, 50, 200), 10
CONFIGS = {
    **{f"dtrpo, K = {k}": EstimatorConfig("dtrpo", num_draws=k) for k in (1, 2, 4, 8)},
    **{f"elbo, K = {k}": EstimatorConfig("elbo", num_draws=k) for k in (1, 2, 4, 8)},
    "mean_field": EstimatorConfig("mean_field"),
    "coupled": EstimatorConfig("coupled"),
    "exact": EstimatorConfig("exact"),
}


class Keep(TrainerCallback):
    """Saves the policy after some numbers of updates."""

    def __init__(self, directory: Path, steps: set[int]):
        self.directory, self.steps = directory, steps

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            model.save_pretrained(self.directory / str(state.global_step))


def train(directory: Path, steps: int, seed: int) -> None:
    task = load_task("sudoku", seed=seed)
    trainer = DTRPOTrainer(
        model=tiny_policy_path(),
        reward_funcs=task.reward_funcs,
        args=DTRPOConfig(
            output_dir=str(directory), per_device_train_batch_size=512, num_generations=16, max_completion_length=17,
            tokens_per_step=2, max_steps=steps, learning_rate=6e-4, warmup_steps=3, beta=0.0, seed=seed, bf16=False,
            gradient_checkpointing=False, save_strategy="no", report_to="none", logging_steps=10,
        ),
        train_dataset=task.train,
        callbacks=[Keep(directory, {n + d for n in POINTS for d in (0, LATER)})],
    )  # fmt: skip
    trainer.model.save_pretrained(directory / "0")
    trainer.train()


def rollouts(policy, size: int, seed: int):
    """Answers to evaluation puzzles, one character a step: 8 steps in a block."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left", trust_remote_code=False)
    prompts = load_task("sudoku", train_size=16).evaluation["prompt"][:size]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    return decode(policy, ids, DecodingConfig(17, 1.0), seeds=[derive_seed(seed, row) for row in range(len(ids))])


def passes(config: EstimatorConfig, batch, spec) -> int:
    states = ESTIMATORS[config.name].states(batch, spec, list(range(len(batch))), config)
    return 1 if ESTIMATORS[config.name].one_row else states.hidden.shape[1]


def resident(field: str) -> float:
    """Resident memory of this process in MiB: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def cost(config: EstimatorConfig, directory: Path, stored: Path, queue) -> None:
    """Seconds and peak memory per response of forward and backward for the stored responses."""
    torch.set_num_threads(2)
    policy = AutoModelForCausalLM.from_pretrained(directory / "0", trust_remote_code=False)
    spec = get_spec(policy.config)
    batch = TrajectoryBatch(**torch.load(stored))

    def update(batch: TrajectoryBatch, seed: int) -> float:
        started = time.perf_counter()
        states = ESTIMATORS[config.name].states(batch, spec, [seed] * len(batch), config)
        logps, _ = score(policy, pack(batch, spec, states, ESTIMATORS[config.name].one_row), spec)
        (logps * states.weights).sum().backward()
        policy.zero_grad()
        return time.perf_counter() - started

    update(batch.select(slice(0, 1)), 0)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed would be there to be used again
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    update(batch, 0)
    peak = resident("VmHWM") - before
    elapsed = statistics.median(update(batch, seed) for seed in range(1, 6))
    queue.put((elapsed / len(batch), peak / len(batch)))


def in_process(function, *arguments):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(*arguments, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(POINTS), figsize=(7.2, 3.6), sharey=True, layout="constrained")
    markers = {"dtrpo": "o", "elbo": "s", "mean_field": "^", "coupled": "D", "exact": "*"}
    for axis, point in zip(axes, POINTS, strict=True):
        for (name, marker), shade in zip(markers.items(), CURVES, strict=False):
            own = [row for row in rows if row["updates"] == point and row["estimator"].split(",")[0] == name]
            error = [max((row["bias"] ** 2 + row["std"] ** 2) ** 0.5 / row["spread"], 1e-3) for row in own]
            axis.plot([row["ms"] for row in own], error, marker=marker, color=css(shade), label=name)
        axis.set(xscale="log", yscale="log")
        axis.set_title(f"after {point} updates", fontsize=9)
        axis.set_xlabel("ms per response", fontsize=9)
        axis.set_xticks([3, 10, 30], labels=["3", "10", "30"])
        axis.set_xticks([], minor=True)
        axis.axhline(1.0, color="gray", linewidth=0.8, linestyle=":")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error / spread of the exact value", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=256)
    parser.add_argument("--estimates", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, default=None, help="where policies are kept; found ones are reused")
    parser.add_argument("--plot", type=Path, default=Path(__file__).parent / "estimators.png")
    parser.add_argument("--json", action="store_true", help="print all rows as one JSON object on the last line")
    args = parser.parse_args()
    torch.set_num_threads(2)

    with tempfile.TemporaryDirectory() as temporary:
        directory = args.directory or Path(temporary)
        last = POINTS[-1] + LATER
        if not (directory / str(last)).exists():
            train(directory, last, args.seed)
        stored = Path(temporary) / "responses.pt"
        torch.save(
            asdict(rollouts(AutoModelForCausalLM.from_pretrained(directory / "0", trust_remote_code=False), 64, 0)),
            stored,
        )
        costs = {name: in_process(cost, config, directory, stored) for name, config in CONFIGS.items()}
        rows = []
        for point in POINTS:
            old, new = (
                AutoModelForCausalLM.from_pretrained(directory / str(n), trust_remote_code=False).eval()
                for n in (point, point + LATER)
            )
            spec = get_spec(old.config)
            batch = rollouts(old, args.responses, args.seed)

            def log_ratios(layout, new=new, old=old, spec=spec):
                return score(new, layout, spec)[0] - score(old, layout, spec)[0]

            seeds = [derive_seed(args.seed, 1, row) for row in range(len(batch))]
            for name, config in CONFIGS.items():
                quality = estimate_quality(log_ratios, batch, spec, config, seeds, args.estimates)
                seconds, memory = costs[name]
                rows.append(
                    {
                        "updates": point,
                        "estimator": name,
                        "bias": round(quality.bias, 4),
                        "std": round(quality.std, 4),
                        "spread": round(quality.exact.std().item(), 4),
                        "correlation": round(quality.correlation, 4),
                        "passes": passes(config, batch, spec),
                        "ms": round(1000 * seconds, 3),
                        "mib": round(memory, 2),
                    }
                )
    header = ["updates", "estimator", "bias", "std", "spread", "correlation", "passes", "ms", "mib"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(row[name]) for name in header) + " |")
    plot(rows, args.plot)
    print(f"Plot: {args.plot}")
    if args.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
