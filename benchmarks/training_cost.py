"""
What an update costs: dTRPO beside supervised fine-tuning, the ELBO and the exact trajectory, in one run.

    python benchmarks/training_cost.py --threads 2
    python benchmarks/training_cost.py --device cuda --dtype bfloat16 --hidden_size 4096 --num_layers 32 --json

A step is forward, backward and AdamW; the making of masks and layouts counts, decoding does not. Every round times each
kind of step once, so that a slow moment of the machine hits all of them. Medians are reported.

- `ar_sft`: next-token loss of the stock causal model, `model(input_ids, labels=...)`.
- `ar_sft_lean`: the same with the head on response tokens only, which the stock `labels=` path does not do.
- `block_sft`: block-diffusion fine-tuning in the published layout, `[noisy | clean]` copies of prompt and response, the
  head on the noisy half.
- `sft`: supervised fine-tuning of `DiffusionSFTTrainer` (`weighting="elbo"`), one packed pass. `sft_complementary`: a mask and its
  complement (`weighting="mean"`), in one packed pass.
- `dtrpo`: one drawn decoding step per block, one packed pass.
- `elbo8`: the ELBO with 8 masks per response, one packed pass for each.
- `exact`: every decoding step of every block, as many packed passes as a block has steps.
- `..._shared`: four responses to one long prompt. `dtrpo_shared` runs the prompt once, `dtrpo_shared_half` scores half of
  the blocks besides.

Passes of `elbo8` and `exact` are back-propagated one after another, which costs the same time and less memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import resource
import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trl_diffusion import DiffusionSpec, set_spec
from trl_diffusion.policies.attention import enable_plans
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score
from trl_diffusion.scoring.states import States
from trl_diffusion.sft.documents import Documents
from trl_diffusion.sft.masks import MaskConfig, document_states
from trl_diffusion.trajectories.trajectory import TrajectoryBatch


def make_model(args) -> torch.nn.Module:
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_key_value_heads,
        head_dim=args.head_dim,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    set_spec(config, spec_of(args))
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype), trust_remote_code=False)
    enable_plans(model)
    return model.train()


def spec_of(args) -> DiffusionSpec:
    return DiffusionSpec(mask_token_id=args.vocab_size - 1, block_size=args.block_size)


def make_batch(args, prompt_length: int, same_prompt: bool) -> TrajectoryBatch:
    """Random tokens, unmasked in a random order inside each block, one at a step."""
    generator = torch.Generator().manual_seed(1)
    rows, length, block = args.batch_size, args.response_length, args.block_size
    prompts = torch.randint(0, args.vocab_size - 1, (1 if same_prompt else rows, prompt_length), generator=generator)
    blocks = torch.rand(rows, length // block, block, generator=generator).argsort(-1)
    return TrajectoryBatch(
        prompt_ids=prompts.expand(rows, -1).contiguous(),
        prompt_mask=torch.ones(rows, prompt_length, dtype=torch.long),
        canvas_ids=torch.randint(0, args.vocab_size - 1, (rows, length), generator=generator),
        steps=blocks.flatten(1),
        logps=torch.zeros(rows, length),
        canvas_lengths=torch.full((rows,), length),
        completion_lengths=torch.full((rows,), length),
    ).to(args.device)


MAX_PASSES = None  # fewer for a look at peak memory, which all passes share


def estimator_loss(model, batch, spec, config: EstimatorConfig, seed: int, share: bool) -> None:
    """Back-propagates the estimated log-likelihood; estimators with a row for each view, one view after another."""
    states = ESTIMATORS[config.name].states(batch, spec, [seed + row for row in range(len(batch))], config)
    if ESTIMATORS[config.name].one_row:
        parts = [states]
    else:
        parts = [
            States(states.hidden[:, [v]], states.coefficients[:, [v]], states.weights, states.prompt_hidden)
            for v in range(states.hidden.shape[1])
        ]
    for part in parts[:MAX_PASSES]:
        layout = pack(batch, spec, part, share_prompts=share)
        logps, _ = score(model, layout, spec)
        (-(logps * layout.weights).sum() / batch.completion_lengths.sum()).backward()


def ar_sft(model, batch, spec, seed) -> None:
    ids = torch.cat([batch.prompt_ids, batch.canvas_ids], 1)
    labels = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) < batch.prompt_ids.shape[1], -100)
    model(input_ids=ids, labels=labels, use_cache=False).loss.backward()


def ar_sft_lean(model, batch, spec, seed) -> None:
    ids, length = torch.cat([batch.prompt_ids, batch.canvas_ids], 1), batch.canvas_ids.shape[1]
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -length - 1 : -1]
    logits = model.lm_head(hidden).float()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.canvas_ids.flatten()).backward()


def block_sft(model, batch, spec, seed) -> None:
    """BD3-LM / Fast-dLLM v2: a noisy and a clean copy of the whole sequence; the head reads the noisy one."""
    ids = torch.cat([batch.prompt_ids, batch.canvas_ids], 1)
    rows, width = ids.shape
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.arange(width) // spec.block_size
    ratio = torch.rand(rows, int(blocks.max()) + 1, generator=generator)[:, blocks]
    masked = (torch.rand(rows, width, generator=generator) < ratio) & (
        torch.arange(width) >= batch.prompt_ids.shape[1]
    )
    masked, blocks = masked.to(ids.device), blocks.to(ids.device)
    noisy = torch.arange(2 * width, device=ids.device) < width
    block = torch.cat([blocks, blocks])
    query, key = block[:, None], block[None, :]
    allowed = torch.where(
        noisy[None, :], noisy[:, None] & (query == key), torch.where(noisy[:, None], key < query, key <= query)
    )
    output = model.model(
        input_ids=torch.cat([ids.masked_fill(masked, spec.mask_token_id), ids], 1),
        position_ids=torch.arange(width, device=ids.device).repeat(2)[None],
        attention_mask=allowed[None, None].expand(rows, -1, -1, -1),
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(output[:, :width]).float()
    labels = ids.masked_fill(~masked, -100)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()


def estimated(name: str, share: bool = False, **options):
    def step(model, batch, spec, seed) -> None:
        options_here = dict(options)
        if options_here.pop("half_of_the_blocks", False):
            options_here["num_blocks"] = batch.canvas_ids.shape[1] // spec.block_size // 2
        estimator_loss(model, batch, spec, EstimatorConfig(name, **options_here), seed, share)

    return step


def supervised(config: MaskConfig):
    """A step of `DiffusionSFTTrainer` on documents that end where their last block ends."""

    def step(model, batch, spec, seed) -> None:
        rows = torch.arange(len(batch), device=batch.canvas_ids.device)
        trained = torch.ones_like(batch.canvas_ids, dtype=torch.bool)
        documents = Documents(
            batch.prompt_ids, batch.prompt_mask, batch.canvas_ids, batch.canvas_lengths, trained, rows, rows
        )
        layout = pack(documents.trajectories(), spec, document_states(documents, spec, seed, config))
        logps, _ = score(model, layout, spec)
        (-(logps * layout.weights).sum() / trained.sum()).backward()

    return step


KINDS = {
    "ar_sft": (ar_sft, False),
    "ar_sft_lean": (ar_sft_lean, False),
    "block_sft": (block_sft, False),
    "sft": (supervised(MaskConfig()), False),
    "sft_complementary": (supervised(MaskConfig("mean", complementary=True)), False),
    "dtrpo": (estimated("dtrpo"), False),
    "elbo8": (estimated("elbo", num_draws=8), False),
    "exact": (estimated("exact"), False),
    "ar_sft_shared": (ar_sft, True),
    "ar_sft_lean_shared": (ar_sft_lean, True),
    "dtrpo_shared": (estimated("dtrpo", share=True), True),
    "dtrpo_shared_half": (estimated("dtrpo", share=True, half_of_the_blocks=True), True),
}


def run_step(kind: str, model, optimizer, batches, spec, seed: int) -> float:
    """Seconds of one optimizer step."""
    function, long_prompt = KINDS[kind]
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function(model, batches[long_prompt], spec, seed)
    optimizer.step()
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def prepare(args):
    torch.set_num_threads(args.threads)
    model = make_model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batches = {
        False: make_batch(args, args.prompt_length, False),
        True: make_batch(args, args.long_prompt_length, True),
    }
    return model, optimizer, batches, spec_of(args)


def peak_memory(kind: str, args, queue) -> None:
    """Peak memory of two steps in a process of its own, in MiB, without the libraries."""
    global MAX_PASSES
    MAX_PASSES = 2
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    prepared = prepare(args)
    for seed in range(2):
        run_step(kind, *prepared[:3], prepared[3], seed)
    if args.device == "cuda":
        queue.put(torch.cuda.max_memory_allocated() / 2**20)
    else:
        queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - baseline)


def measure_memory(kinds: list[str], args) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for kind in kinds:
        queue = context.Queue()
        process = context.Process(target=peak_memory, args=(kind, args, queue))
        process.start()
        peaks[kind] = queue.get()
        process.join()
    return peaks


def make_parser(description: str) -> argparse.ArgumentParser:
    """The configuration that benchmarks of costs share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("vocab_size", 32_000), ("hidden_size", 512), ("intermediate_size", 1536), ("num_layers", 12), ("num_heads", 8),
        ("num_key_value_heads", 8), ("head_dim", 64), ("batch_size", 4), ("prompt_length", 128), ("response_length", 256),
        ("long_prompt_length", 512), ("block_size", 32), ("threads", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true", help="print the ratios as one JSON object on the last line")
    return parser


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--no_memory", action="store_true", help="do not measure peak memory")
    args = parser.parse_args()

    peaks = {} if args.no_memory else measure_memory(args.kinds, args)
    model, optimizer, batches, spec = prepare(args)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f}M parameters, {args.dtype} on {args.device}, {args.threads} threads")
    seconds = {kind: [] for kind in args.kinds}
    for round_number in range(args.rounds + 1):  # the first round warms up
        for kind in args.kinds:
            if round_number == 0 and kind == "exact" and args.device == "cpu":
                continue
            elapsed = run_step(kind, model, optimizer, batches, spec, round_number)
            gc.collect()
            if round_number:
                seconds[kind].append(elapsed)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    print(f"{'step':<20}{'seconds':>10}{'range':>18}{'peak MiB':>10}")
    for kind, values in seconds.items():
        spread = f"{min(values):.2f} - {max(values):.2f}"
        print(f"{kind:<20}{medians[kind]:>10.3f}{spread:>18}{peaks.get(kind, float('nan')):>10.0f}")

    pairs = {
        "vs_block_sft": ("dtrpo", "block_sft"),
        "vs_ar_sft": ("dtrpo", "ar_sft"),
        "vs_ar_sft_lean": ("dtrpo", "ar_sft_lean"),
        "sft_vs_block_sft": ("sft", "block_sft"),
        "sft_vs_ar_sft": ("sft", "ar_sft"),
        "sft_complementary_vs_block_sft": ("sft_complementary", "block_sft"),
        "vs_elbo8": ("dtrpo", "elbo8"),
        "vs_exact": ("dtrpo", "exact"),
        "vs_ar_sft_shared_prompt": ("dtrpo_shared", "ar_sft_shared"),
        "vs_ar_sft_lean_shared_prompt": ("dtrpo_shared", "ar_sft_lean_shared"),
        "vs_ar_sft_shared_prompt_half_the_blocks": ("dtrpo_shared_half", "ar_sft_shared"),
    }
    ratios = {
        name: round(medians[ours] / medians[theirs], 4)
        for name, (ours, theirs) in pairs.items()
        if ours in medians and theirs in medians
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")
    if args.json:
        print(json.dumps(ratios))


if __name__ == "__main__":
    main()
