"""
Is decoding as fast as it was, and does it give the same tokens? Times this checkout and another one, in turns.

    git worktree add before REVISION
    python benchmarks/versions.py before --json

Each turn is a fresh process, which decodes with one thread and counts its own core seconds: the embedded policy (block attention) and a random
policy with full attention, each `--repeats` times after a first one, of which the median counts. The ratio of a round is this checkout's
time over the other one's; the interval of 95 % is over rounds (Student's t). Beside it stand the tensor operations and the calls of Python
functions in one decoding, which do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
TURN = """
import hashlib, json, sys, time
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl_diffusion import DecodingConfig, DiffusionSpec, decode, set_spec, tiny_policy_path
from torch.utils._python_dispatch import TorchDispatchMode
from trl_diffusion.rewards import sudoku

class Operations(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))

torch.set_num_threads(1)
count, repeats = int(sys.argv[1]), int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
block = AutoModelForCausalLM.from_pretrained(tiny_policy_path()).eval()
spec = DiffusionSpec(mask_token_id=1, attention="full", block_size=16, block_origin="response", stop_token_ids=(2,))
config = AutoConfig.for_model(
    "qwen3", vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.1,
)
set_spec(config, spec)
torch.manual_seed(0)
full = AutoModelForCausalLM.from_config(config).eval()
prompts = [tokenizer(sudoku.prompt(row["puzzle"]))["input_ids"] for row in sudoku.generate(count, 0)]
found = {}
for name, model, settings in (
    ("block", block, DecodingConfig(32, 1.0, tokens_per_step=2, strategy="entropy")),
    ("full", full, DecodingConfig(32, 1.0, tokens_per_step=2, strategy="entropy")),
):
    times = []
    for _ in range(repeats + 1):
        started = time.process_time()
        batch = decode(model, prompts, settings, seeds=list(range(count)))
        times.append(time.process_time() - started)
    with Operations() as operations:
        decode(model, prompts, settings, seeds=list(range(count)))
    calls = [0]
    sys.setprofile(lambda frame, event, arg: calls.__setitem__(0, calls[0] + (event == "call")))
    decode(model, prompts, settings, seeds=list(range(count)))
    sys.setprofile(None)
    kept = (batch.canvas_ids, batch.steps, batch.logps)
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in kept)).hexdigest()
    found[name] = {"times": times[1:], "digest": digest, "operations": operations.count, "calls": calls[0]}
print(json.dumps(found))
"""


def turn(checkout: Path, args) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", TURN, str(args.prompts), str(args.repeats)]
    result = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{checkout}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print all results as one JSON object on the last line")
    args = parser.parse_args()
    from trl_diffusion.utils import half_width

    pairs: list[tuple[dict, dict]] = []
    for number in range(args.rounds):
        checkouts = [ROOT, args.other.resolve()]
        order = checkouts if number % 2 == 0 else checkouts[::-1]
        by = {checkout: turn(checkout, args) for checkout in order}
        pairs.append((by[checkouts[0]], by[checkouts[1]]))
    rows = {}
    for name in pairs[0][0]:
        ratios = [statistics.median(a[name]["times"]) / statistics.median(b[name]["times"]) for a, b in pairs]
        same = len({one[name]["digest"] for pair in pairs for one in pair}) == 1
        rows[name] = {"ratio": statistics.mean(ratios), "half": half_width(ratios), "ratios": ratios, "same": same}
        for kind in ("operations", "calls"):
            rows[name][kind] = [pairs[0][which][name][kind] for which in (0, 1)]
        shares = {kind: rows[name][kind][0] / rows[name][kind][1] for kind in ("operations", "calls")}
        print(f"{name}: {rows[name]['ratio']:.3f} +- {rows[name]['half']:.3f} of the time, "
              f"{shares['operations']:.4f} of the operations, {shares['calls']:.4f} of the calls, "
              f"{'the same' if same else 'OTHER'} tokens, steps and log-probabilities")  # fmt: skip
    if args.json:
        print(json.dumps({"rounds": args.rounds, "prompts": args.prompts, **rows}))


if __name__ == "__main__":
    main()
