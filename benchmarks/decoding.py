"""
How fast responses are decoded: this project's engine beside the loops that the families published, in one run.

    python benchmarks/decoding.py --threads 2 --json
    python benchmarks/decoding.py --device cuda --dtype bfloat16 --hidden_size 3584 --num_layers 28 --json

Both sides run the same weights (random, of the family's shape and a vocabulary of 151,936 entries, scaled down in depth and
width on a CPU) and must give the same tokens. The published loops (`benchmarks/published.py`) take one prompt at a time and
compute the logits of every position of every pass. Ours takes all prompts at once. Tokens are counted up to and including
the stop token on both sides. Each round times every side once, in turn, so that a slow moment of the machine hits both;
medians are reported.

`--plot FILE` also decodes batches whose responses stop early and draws the cost against the tokens produced.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import published  # beside this file
import torch
from transformers import AutoModelForCausalLM

from trl_diffusion import DecodingConfig, decode, get_spec
from trl_diffusion.policies.families.configs import Fast_dLLM_QwenConfig, LLaDAConfig
from trl_diffusion.utils import use_all_cores


# A vocabulary of the size of the published ones. Its last entry is the mask token; the stop token is set for each run.
VOCABULARY = 151_936
MASK = VOCABULARY - 1
CONFIGS = {"fast_dllm_v2": Fast_dLLM_QwenConfig, "llada": LLaDAConfig}


def make_model(family: str, args) -> torch.nn.Module:
    config = CONFIGS[family](
        vocab_size=VOCABULARY,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=args.hidden_size // 64 if family == "llada" else max(1, args.hidden_size // 256),
        max_position_embeddings=4096,
        initializer_range=0.1,
        mask_token_id=MASK,
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, args.dtype), trust_remote_code=False
        ).eval()


def make_prompts(count: int, args) -> list[list[int]]:
    """Prompts of mixed lengths, around `--prompt_length`."""
    generator = torch.Generator().manual_seed(1)
    lengths = [args.prompt_length * (2 + row % 5) // 4 for row in range(count)] if count > 1 else [args.prompt_length]
    return [torch.randint(0, MASK, (length,), generator=generator).tolist() for length in lengths]


def sides(family: str, model, args) -> tuple[DecodingConfig, Callable[[list[int]], list[int]]]:
    """Our settings, and the published loop from a prompt to a response."""
    length = args.response_length

    def run(loop, **settings):
        def response(prompt: list[int]) -> list[int]:
            ids = torch.tensor([prompt], device=args.device)
            return loop(model, ids, length, mask=MASK, **settings)[0, len(prompt) :].tolist()[:length]

        return response

    if family == "llada":
        config = DecodingConfig(length, steps_per_block=32, allow_mask_token=True)
        return config, run(published.llada, block_length=32, steps_per_block=32)
    config = DecodingConfig(length, strategy="threshold", threshold=1.0, sub_block_size=8, stop_rule="token")
    return config, run(published.fast_dllm_v2, stop=args.stop)


def timed(function: Callable, args) -> tuple[float, object]:
    """Seconds, and what the function returns."""
    if args.device == "cuda":
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000, result
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def until_stop(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


def compare(family: str, count: int, args) -> dict[str, float]:
    """One row of the table."""
    model = make_model(family, args)
    prompts = make_prompts(count, args)
    spec = get_spec(model.config, {"block_size": 32, "stop_token_ids": (args.stop,)})
    config, published_loop = sides(family, model, args)
    ours, theirs = [], []
    for _ in range(args.rounds):
        seconds, batch = timed(lambda: decode(model, prompts, config, spec), args)
        ours.append(seconds)
        seconds, responses = timed(lambda: [published_loop(prompt) for prompt in prompts], args)
        theirs.append(seconds)
        responses = [until_stop(tokens, args.stop) for tokens in responses]
        if batch.completions() != responses:
            raise SystemExit(f"{family}, batch {count}: the tokens differ.")
    tokens = sum(len(response) for response in responses)
    return {
        "tokens": tokens,
        "ours": tokens / statistics.median(ours),
        "published": tokens / statistics.median(theirs),
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "lowest": min(theirs) / max(ours),
        "highest": max(theirs) / min(ours),
    }


def cost_by_tokens(args, path: Path) -> None:
    """Draws the seconds of a batch against the tokens produced, for responses that stop at different lengths."""
    from matplotlib.figure import Figure

    model = make_model("fast_dllm_v2", args)
    prompts = make_prompts(8, args)
    spec = get_spec(model.config, {"block_size": 32, "stop_token_ids": ()})
    config = DecodingConfig(args.response_length, strategy="threshold", threshold=1.0, sub_block_size=8)
    full = decode(model, prompts, config, spec).completions()
    points = []
    for place in range(0, args.response_length, args.response_length // 8):
        # The tokens that the responses hold at some place become stop tokens: they end there, or earlier.
        stops = tuple({tokens[max(place - 1, 0)] for tokens in full})
        stopping = DecodingConfig(
            args.response_length,
            strategy="threshold",
            threshold=1.0,
            sub_block_size=8,
            stop_rule="token",
            stop_token_ids=stops,
        )
        seconds, batch = timed(lambda stopping=stopping: decode(model, prompts, stopping, spec), args)
        points.append((int(batch.completion_lengths.sum()), seconds))
    seconds, batch = timed(lambda: decode(model, prompts, config, spec), args)
    points.append((int(batch.completion_lengths.sum()), seconds))
    axes = Figure(figsize=(5, 3.4), layout="constrained").subplots()
    axes.plot(*zip(*sorted(points), strict=True), "o-")
    axes.set_xlabel(f"tokens produced by 8 responses (at most {8 * args.response_length})")
    axes.set_ylabel("seconds")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.figure.savefig(path, dpi=120)
    print("tokens, seconds:", sorted((tokens, round(seconds, 2)) for tokens, seconds in points))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--intermediate_size", type=int, default=768)
    parser.add_argument("--num_layers", type=int, default=6)
    parser.add_argument("--prompt_length", type=int, default=48)
    parser.add_argument("--response_length", type=int, default=64)
    parser.add_argument("--stop", type=int, default=-1, help="stop token; -1 for none")
    parser.add_argument("--families", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--plot", type=Path, help="PNG of the cost of responses that stop early")
    parser.add_argument("--json", action="store_true", help="print the ratios as one JSON object on the last line")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    else:
        use_all_cores()
    ratios = {}
    print("| family | batch | tokens | tokens/s | published loop | ratio | range |\n|---|---|---|---|---|---|---|")
    for family in args.families:
        for count in args.batches:
            row = compare(family, count, args)
            ratios[f"{family}_batch{count}"] = round(row["ratio"], 3)
            print(
                f"| {family} | {count} | {row['tokens']} | {row['ours']:.1f} | {row['published']:.1f} | "
                f"**{row['ratio']:.2f}** | {row['lowest']:.2f} - {row['highest']:.2f} |",
                flush=True,
            )
    if args.plot:
        cost_by_tokens(args, args.plot)
    if args.json:
        print(json.dumps(ratios))


if __name__ == "__main__":
    main()
