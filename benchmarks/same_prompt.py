"""
What it saves that responses to the same prompt share the run of its whole blocks: rollouts of groups, with and without it, in turn.

    python benchmarks/same_prompt.py --json
    python benchmarks/same_prompt.py --model outputs/adapt/adapt/policy --task word_sums --groups 4 --max_new_tokens 20 --json

Both sides decode the same answers at temperature 1, two tokens a step. Seconds are those of the process's processor time. The ratio
is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from trl_diffusion import DecodingConfig, decode, tiny_policy_path
from trl_diffusion.decoding.loop import DenoisingLoop
from trl_diffusion.policies.policy import open_policy
from trl_diffusion.tasks import load_task


SHARED = DenoisingLoop._share_prompts


def alone(loop, places, lanes, cached):
    """Every lane runs its own prompt."""
    loop.cache.slots.copy = None
    return cached


@torch.no_grad()
def seconds(policy, ids: list[list[int]], config: DecodingConfig, share: bool) -> tuple[float, torch.Tensor]:
    DenoisingLoop._share_prompts = SHARED if share else alone
    started = time.process_time()
    made = decode(policy.model, ids, config, policy.spec, seeds=list(range(len(ids))))
    return time.process_time() - started, made.canvas_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=tiny_policy_path(), help="a policy with block attention")
    parser.add_argument("--task", default="sudoku")
    parser.add_argument("--groups", type=int, default=16, help="prompts")
    parser.add_argument("--num_generations", type=int, default=8, help="answers to each")
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object on the last line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    policy, task = open_policy(args.model), load_task(args.task, train_size=args.groups, eval_size=1)
    prompts = policy.encode(list(task.train["prompt"]))
    ids = [prompt for prompt in prompts for _ in range(args.num_generations)]
    config = DecodingConfig(args.max_new_tokens, temperature=1.0, tokens_per_step=2)
    times: dict[bool, list[float]] = {True: [], False: []}
    same = 0.0
    for number in range(args.rounds + 1):
        found = {share: seconds(policy, ids, config, share) for share in times}
        same = (found[True][1] == found[False][1]).float().mean().item()
        for share, (took, _) in found.items():
            times[share] += [took] if number else []  # the first round warms up
    ratio = statistics.median(one / other for one, other in zip(times[True], times[False], strict=True))
    result = {
        "answers": len(ids), "prompt_tokens": len(prompts[0]), "shared": statistics.median(times[True]),
        "alone": statistics.median(times[False]), "ratio": round(ratio, 3), "same_tokens": same,
    }  # fmt: skip
    print(f"{len(ids)} answers to prompts of {len(prompts[0])} tokens: {result['shared']:.2f} s instead of {result['alone']:.2f} s, "
          f"ratio {ratio:.2f}, {same:.1%} of the tokens are the same")  # fmt: skip
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
