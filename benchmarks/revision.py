"""
Does it pay to take tokens back? Sudokus with two clues, solved at equal numbers of forward passes, before and after training.

    python benchmarks/revision.py --seeds 0 1 2 --directory outputs/revision --json

Two embedded policies with full attention over the whole answer are compared, which differ in their pretraining alone:
`revising` was shown wrong visible tokens as well. `ARMS` lists ways to decode. Those without `revision` use the policy `full`.

- before: every arm at 4, 6, 8, 12 and 16 passes at most, at temperatures 0 and 1, on 500 evaluation puzzles;
- after: the arms of `--train` are trained for `--updates` updates of `--batch_size` answers, at `--passes` passes and temperature 1,
  once for each seed, and measured like before.

Adaptive rules stop earlier or later, so their number of passes is measured: the mean over the answers. Their thresholds are chosen
again for each policy: of the thresholds in `THRESHOLDS` whose mean number of passes is not above the limit, the one that solves
most of 500 training puzzles. Intervals of 95 %: over puzzles before training (binomial), over seeds after it (Student's t).

What is done is kept in `--directory`: the same command goes on where it stopped. Two of these commands with different seeds can run
at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_diffusion import DecodingConfig, DTRPOConfig, DTRPOTrainer, decode, tiny_policy_path
from trl_diffusion.rewards import sudoku
from trl_diffusion.seeds import derive_seed
from trl_diffusion.tasks import load_task
from trl_diffusion.utils import half_width, write_text


LENGTH = 17
PASSES = (4, 6, 8, 12, 16)
THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
REVISE = {"revision": "confidence"}
SAMPLED = {"strategy": "sampled_confidence", "score_selection": True}
RANKS = {
    "revision": "confidence",
    "revision_threshold": 1.0,
    "revision_max": 3,
    "revision_limit": 6,
}  # the three least likely
ARMS = {
    "confidence": {},
    "sampled_confidence": {"strategy": "sampled_confidence"},
    "sampled_confidence, scored": SAMPLED,
    "entropy": {"strategy": "entropy"},
    "threshold": {"strategy": "threshold"},
    "revising": REVISE,
    "revising, sampled_confidence, scored": {**SAMPLED, **REVISE},
    "revising by ranks": RANKS,
    "edit": {"revision": "edit"},
    "self_planning": {"revision": "self_planning", "fill_share": 1.0},
    "random": {"revision": "random", "fill_share": 1.0},
    "revising policy that does not revise": {},
}


def policy_of(arm: str) -> str:
    return tiny_policy_path("revising" if "revision" in ARMS[arm] or arm.startswith("revising") else "full")


def settings(arm: str, passes: int, temperature: float, threshold: float | None = None) -> DecodingConfig:
    chosen = {key: value for key, value in ARMS[arm].items() if temperature > 0 or key != "score_selection"}
    if arm == "threshold":
        return DecodingConfig(LENGTH, temperature, threshold=threshold, **chosen)
    return DecodingConfig(LENGTH, temperature, steps_per_block=passes, **chosen)


def solve(policy, tokenizer, puzzles: list[str], decoding: DecodingConfig, seed: int) -> tuple[float, float]:
    """Share of puzzles that are solved, and mean number of forward passes of an answer."""
    ids = [tokenizer(sudoku.prompt(puzzle))["input_ids"] for puzzle in puzzles]
    passes = 0

    def count(loop) -> None:
        nonlocal passes
        passes += len(loop.active_lanes())

    batch = decode(policy, ids, decoding, seeds=[derive_seed(seed, row) for row in range(len(ids))], on_step=count)
    texts = tokenizer.batch_decode(batch.completions(), skip_special_tokens=True)
    return sum(sudoku.sudoku_solved(texts, puzzles)) / len(texts), passes / len(ids)


def measure(path: str, arm: str, seed: int) -> list[dict]:
    """Solve rates of a policy at all numbers of passes and both temperatures."""
    policy = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=False)
    puzzles = list(sudoku.evaluation_puzzles(14))
    others = [row["puzzle"] for row in sudoku.generate(500, 1234, 14, puzzles)]
    rows = []
    for temperature in (0.0, 1.0):
        points = [(passes, None) for passes in PASSES]
        if arm == "threshold":
            found = {
                threshold: solve(policy, tokenizer, others, settings(arm, 0, temperature, threshold), seed)
                for threshold in THRESHOLDS
            }
            points = []
            for passes in PASSES:
                fitting = [threshold for threshold, (_, needed) in found.items() if needed <= passes]
                if fitting:
                    points.append((passes, max(fitting, key=lambda threshold: found[threshold][0])))
        for passes, threshold in points:
            decoding = settings(arm, passes, temperature, threshold)
            rate, needed = solve(policy, tokenizer, puzzles, decoding, seed)
            rows.append({"temperature": temperature, "limit": passes, "passes": round(needed, 2), "solved": rate,
                         "threshold": threshold})  # fmt: skip
    return rows


def train(arm: str, seed: int, args, directory: str) -> float:
    """Trains an arm. Returns the seconds."""
    task = load_task("sparse_sudoku", seed=seed)
    decoding = settings(arm, args.passes, 1.0, args.threshold).rollout_settings()
    trainer = DTRPOTrainer(
        model=policy_of(arm),
        reward_funcs=task.reward_funcs,
        args=DTRPOConfig(
            output_dir=directory, per_device_train_batch_size=args.batch_size, num_generations=16,
            max_completion_length=LENGTH, max_steps=args.updates, learning_rate=args.learning_rate, warmup_steps=3,
            lr_scheduler_type="linear", num_draws=4, beta=0.0, seed=seed, bf16=False, gradient_checkpointing=False,
            dataloader_pin_memory=False, save_strategy="no", report_to="none", disable_tqdm=True,
            logging_strategy="no", **decoding,
        ),
        train_dataset=task.train,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    trainer.save_model(directory)
    return time.perf_counter() - started


def kept(path: Path, make) -> dict:
    """What a file holds. It is made first if it is not there."""
    if not path.is_file():
        write_text(path, json.dumps(make()) + "\n")
    print(path.stem, flush=True)
    return json.loads(path.read_text())


def after(arm: str, seed: int, args) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        seconds = train(arm, seed, args, directory)
        return {"seconds": seconds, "rows": measure(directory, arm, seed)}


def binomial(rate: float, count: int = 500) -> float:
    return 1.96 * (rate * (1 - rate) / count) ** 0.5


def table(found: dict[str, list[dict]], temperature: float) -> str:
    """Solve rates by arm and limit of passes. `found`: one result for each seed, or a single one."""
    lines = ["| arm | " + " | ".join(f"{n} passes" for n in PASSES) + " |", "|---" * (len(PASSES) + 1) + "|"]
    for arm, results in found.items():
        cells = []
        for passes in PASSES:
            rows = [row for one in results for row in one["rows"]
                    if row["limit"] == passes and row["temperature"] == temperature]  # fmt: skip
            if not rows:
                cells.append("")
                continue
            rates = [row["solved"] for row in rows]
            mean, half = statistics.mean(rates), binomial(rates[0])
            if len(rates) > 1:
                half = half_width(rates)
            needed = statistics.mean(row["passes"] for row in rows)
            cells.append(
                f"{100 * mean:.1f} +- {100 * half:.1f}" + (f" ({needed:.1f})" if needed < passes - 0.05 else "")
            )
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of {list(ARMS)}")
    parser.add_argument("--train", nargs="*", choices=ARMS, metavar="ARM",
                        default=["confidence", "sampled_confidence, scored", "entropy", "threshold",
                                 "revising by ranks"], help="arms that are trained")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--passes", type=int, default=6, help="most passes of an answer while training")
    parser.add_argument("--threshold", type=float, default=0.7, help="of the arm `threshold`, while training")
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=256, help="answers of an update")
    parser.add_argument("--learning_rate", type=float, default=6e-4)
    parser.add_argument("--directory", type=Path, default=Path("outputs/revision"), help="where results are kept")
    parser.add_argument("--json", action="store_true", help="print all results as one JSON object on the last line")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.directory.mkdir(parents=True, exist_ok=True)
    before = {
        arm: [kept(args.directory / f"before_{arm}.json", lambda arm=arm: {"rows": measure(policy_of(arm), arm, 0)})]
        for arm in args.arms
    }
    trained = {}
    for seed in args.seeds:
        for arm in args.train:
            path = (
                args.directory / f"after_{arm}_{seed}_{args.updates}x{args.batch_size}_lr{args.learning_rate:g}.json"
            )
            trained.setdefault(arm, []).append(kept(path, lambda arm=arm, seed=seed: after(arm, seed, args)))
    for name, found in (("before training", before), ("after training", trained)):
        for temperature in (0.0, 1.0):
            print(f"\n{name}, temperature {temperature:g}\n\n{table(found, temperature)}")
    if args.json:
        print(json.dumps({"before": before, "after": trained}))


if __name__ == "__main__":
    main()
