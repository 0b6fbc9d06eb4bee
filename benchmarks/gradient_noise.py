"""
How noisy the gradient of one update is, by estimator and by the distribution of draws.

    python benchmarks/gradient_noise.py --json

The embedded policy, before training and after some updates of `recipes/tiny_sudoku.yaml`'s kind, answers sudoku puzzles, 16 times
each. On the same responses, with the advantages of their groups, the exact policy gradient (every denoising step is scored) is compared
with estimates of it. Columns, over `--estimates` draws:

- noise: mean squared distance to the exact gradient, divided by the squared norm of the exact one; with a bias it holds that, too;
- low, high: 95 % interval of the mean (normal approximation over the estimates);
- cosine: mean cosine with the exact gradient.

Settings: two characters a step; every character whose likeliest token is above 0.9; the same weights with full attention, where a pass
holds a single state of the whole response.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_diffusion import DecodingConfig, DiffusionSpec, DTRPOConfig, DTRPOTrainer, decode, get_spec, tiny_policy_path
from trl_diffusion.policies.spec import set_spec
from trl_diffusion.rewards import sudoku
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score
from trl_diffusion.seeds import derive_seed
from trl_diffusion.tasks import load_task
from trl_diffusion.trajectories.trajectory import TrajectoryBatch


GROUP = 16
DECODINGS = {
    "two a step": DecodingConfig(17, 1.0, tokens_per_step=2),
    "threshold 0.9": DecodingConfig(17, 1.0, strategy="threshold", threshold=0.9),
}
CONFIGS = {
    "uniform": EstimatorConfig(step_distribution="uniform"),
    "token": EstimatorConfig(step_distribution="token"),
    "importance": EstimatorConfig(),
    "importance, K = 2": EstimatorConfig(num_draws=2),
    "elbo, K = 8": EstimatorConfig("elbo", num_draws=8),
    "coupled": EstimatorConfig("coupled"),
    "mean_field": EstimatorConfig("mean_field"),
}


def train(directory: Path, updates: int, seed: int) -> str:
    """The embedded policy after some updates."""
    task = load_task("sudoku", seed=seed)
    trainer = DTRPOTrainer(
        model=tiny_policy_path(),
        reward_funcs=task.reward_funcs,
        args=DTRPOConfig(
            output_dir=str(directory), per_device_train_batch_size=256, num_generations=GROUP, max_completion_length=17,
            tokens_per_step=2, max_steps=updates, learning_rate=6e-4, lr_scheduler_type="constant", beta=0.0, seed=seed,
            bf16=False, gradient_checkpointing=False, save_strategy="no", report_to="none", logging_steps=10,
        ),
        train_dataset=task.train,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(directory))
    return str(directory)


def rollout(
    policy, spec: DiffusionSpec, decoding: DecodingConfig, puzzles: int, seed: int
) -> tuple[TrajectoryBatch, Tensor]:
    """Responses to puzzles that training does not see, and their advantages, `(R,)`."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left", trust_remote_code=False)
    chosen = list(sudoku.evaluation_puzzles())[:puzzles]
    ids = [tokenizer(sudoku.prompt(puzzle))["input_ids"] for puzzle in chosen for _ in range(GROUP)]
    batch = decode(policy, ids, decoding, spec, seeds=[derive_seed(seed, row) for row in range(len(ids))])
    texts = tokenizer.batch_decode(batch.completions(), skip_special_tokens=True)
    rows = [puzzle for puzzle in chosen for _ in range(GROUP)]
    rewards = torch.tensor([sudoku.sudoku_solved(texts, rows), sudoku.sudoku_units(texts, rows)]).sum(0)
    groups = rewards.view(-1, GROUP)
    return batch, ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def gradient(policy, spec, batch: TrajectoryBatch, advantages: Tensor, config: EstimatorConfig, seed: int) -> Tensor:
    """The estimate of the policy gradient, as one vector in float64."""
    estimator = ESTIMATORS[config.name]
    states = estimator.states(batch, spec, [derive_seed(seed, row) for row in range(len(batch))], config)
    policy.zero_grad()
    for part in torch.arange(len(batch)).split(64):
        own = type(states)(states.hidden[part], states.coefficients[part], states.weights[part],
                           None if states.prompt_hidden is None else states.prompt_hidden[part])  # fmt: skip
        layout = pack(batch.select(part), spec, own, estimator.one_row)
        logps, _ = score(policy, layout, spec)
        (logps * layout.weights * advantages[part][:, None]).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()]).double()


def compare(policy, spec, batch, advantages, estimates: int) -> list[dict]:
    exact = gradient(policy, spec, batch, advantages, EstimatorConfig("exact"), 0)
    rows = []
    for name, config in CONFIGS.items():
        found = [gradient(policy, spec, batch, advantages, config, 1 + number) for number in range(estimates)]
        noise = torch.stack([(one - exact).square().sum() / exact.square().sum() for one in found])
        half = 1.96 * noise.std() / estimates**0.5
        cosine = torch.stack([torch.cosine_similarity(one, exact, dim=0) for one in found]).mean()
        figures = {"noise": noise.mean(), "low": noise.mean() - half, "high": noise.mean() + half, "cosine": cosine}
        rows.append({"estimator": name, **{key: round(value.item(), 4) for key, value in figures.items()}})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--puzzles", type=int, default=16)
    parser.add_argument("--estimates", type=int, default=8)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print all rows as one JSON object on the last line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        trained = train(Path(directory), args.updates, args.seed)
        for updates, path in ((0, tiny_policy_path()), (args.updates, trained)):
            policy = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False).eval()
            for attention in ("block", "full"):
                spec = get_spec(policy.config).replace(attention=attention)
                set_spec(policy.config, spec)
                for rule, decoding in DECODINGS.items():
                    batch, advantages = rollout(policy, spec, decoding, args.puzzles, args.seed)
                    setting = {"updates": updates, "attention": attention, "decoding": rule}
                    rows += [{**setting, **row} for row in compare(policy, spec, batch, advantages, args.estimates)]
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    if args.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
