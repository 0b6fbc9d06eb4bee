"""
Is the order of denoising worth storing? Trains the embedded policy on the same responses with the order in which they were
written, and with orders chosen afterwards, as for responses that come as text from a server that does not tell.

    python benchmarks/replay.py --directory outputs/replay --json

The answers to `--prompts` puzzles are collected once by the embedded policy (16 to each). Their texts and rewards are then written to
a file, and imported by `trl-diffusion collect --responses`, which knows no orders. A puzzle with an answer that did not end is left out of
the file, since an imported answer ends. Each seed trains on both with `recipes/tiny_offline.yaml`: on recorded orders, and on imported
ones with each of `--orders` as `decoding_order`. Solve rates are greedy, on 500 puzzles. Differences from recorded orders are paired by
seed (Student's t, 95 %). All that is done is kept in `--directory`: killed anywhere, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


RECORDED = "recorded"


def run(*words: str) -> None:
    command = [sys.executable, "-m", "trl_diffusion", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr[-2000:]}")


def collected(directory: Path, prompts: int) -> tuple[Path, Path]:
    """The collection with recorded orders, and the one of the same texts without."""
    from trl_diffusion import load_trajectories, tiny_policy_path
    from trl_diffusion.policies.loading import load_tokenizer
    from trl_diffusion.trajectories.dataset import REWARD_PREFIX, completions_of

    recorded, imported, file = directory / RECORDED, directory / "imported", directory / "responses.jsonl"
    sizes = ("--train_size", str(prompts))
    if not (directory / "done").is_file():
        run("collect", *sizes, "--output_dir", str(recorded))  # goes on where it was
        rows, tokenizer = load_trajectories(recorded), load_tokenizer(tiny_policy_path())
        names = [name for name in rows.column_names if name.startswith(REWARD_PREFIX)]
        with file.open("w") as lines:
            for row in rows:
                if not all(ids[-1] == tokenizer.eos_token_id for ids in completions_of(row)):
                    continue
                rewards = {name.removeprefix(REWARD_PREFIX): row[name] for name in names}
                texts = tokenizer.batch_decode(completions_of(row), skip_special_tokens=True)
                kept = {"prompt": row["prompt"], "puzzle": row["puzzle"], "responses": texts, "rewards": rewards}
                lines.write(json.dumps(kept) + "\n")
        run("collect", "--responses", str(file), "--output_dir", str(imported))
        (directory / "done").touch()
    return recorded, imported


def trained(directory: Path, stored: Path, name: str, seed: int, extra: list[str]) -> dict[str, Any]:
    """What a training on stored responses gains."""
    output = directory / f"{name}_{seed}"
    row = directory / f"{name}_{seed}.json"
    if not row.is_file():
        options = ("--seed", str(seed), "--output_dir", str(output), "--trajectories", str(stored), *extra)
        run("train", "--config", "tiny_offline", *options, "--resume_from_checkpoint", "true")
        row.write_text((output / "results.json").read_text())
    found = json.loads(row.read_text())
    return {"before": found["solve_rate_before"], "after": found["solve_rate_after"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("outputs/replay"))
    parser.add_argument("--prompts", type=int, default=320)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--orders", nargs="+", default=["confidence", "random", "left_to_right"])
    parser.add_argument(
        "--options", nargs="*", default=[], help="further options of `trl-diffusion train`, without `--`"
    )
    parser.add_argument("--json", action="store_true", help="print all results as one JSON object on the last line")
    args = parser.parse_args()
    from trl_diffusion.utils import half_width

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.directory.mkdir(parents=True, exist_ok=True)
    recorded, imported = collected(args.directory, args.prompts)
    options = [f"--{word}" if number % 2 == 0 else word for number, word in enumerate(args.options)]
    rates: dict[str, list[float]] = {}
    for seed in args.seeds:
        for name in (RECORDED, *args.orders):
            stored = recorded if name == RECORDED else imported
            extra = [*options, *([] if name == RECORDED else ["--decoding_order", name])]
            found = trained(args.directory, stored, name, seed, extra)
            rates.setdefault(name, []).append(100 * found["after"])
            print(f"seed {seed}, {name}: {found['before']:.1%} -> {found['after']:.1%}", flush=True)
    rows = {}
    for name, values in rates.items():
        less = [value - other for value, other in zip(values, rates[RECORDED], strict=True)]
        rows[name] = {"after": values, "mean": statistics.mean(values), "minus_recorded": statistics.mean(less)}
        if len(values) > 1:
            rows[name] |= {"half": half_width(values), "minus_recorded_half": half_width(less)}
        print(f"{name}: {rows[name]['mean']:.1f} %, {rows[name]['minus_recorded']:+.1f} points from recorded orders"
              + (f" +- {rows[name]['minus_recorded_half']:.1f}" if len(values) > 1 else ""))  # fmt: skip
    if args.json:
        print(json.dumps({"prompts": args.prompts, "seeds": args.seeds, "options": args.options, "orders": rows}))


if __name__ == "__main__":
    main()
