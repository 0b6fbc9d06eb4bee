"""
Do experts chosen otherwise explain the gap between recorded and re-scored log-probabilities, and does router replay close it?

    python benchmarks/expert_routing.py --json

Two small policies with the backbone of LLaDA 2 learn 4x4 sudoku: one has experts in all layers but the first, the other has none.
Each answers puzzles one at a time, which records the log-probability of every token and the experts of every token in every pass.
Then all answers are scored together, in every state (the estimator `exact`), and the two log-probabilities of each token are compared. With replay,
each token of the packed row goes to the experts that it went to while the answer was decoded. Their weights are computed again.

Settings, while decoding and while scoring:

- `float32`, `bfloat16`: both in this precision. Only the shapes of the products differ.
- `bfloat16, scored in float32`: as with an engine whose arithmetic is another one.
- `noisy router`: float32, and while decoding normal noise of `--noise` standard deviations is added to what the router sees.
- `capacity`: float32, and while decoding an expert takes at most `--capacity` times the tokens of an even share. Where there are more, those
  that it has the smallest weight for are dropped. Replay drops them too.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback

from trl_diffusion import DecodingConfig, DiffusionSFTConfig, DiffusionSFTTrainer, decode, get_spec, tiny_policy_path
from trl_diffusion.policies.families.configs import LLaDA2MoeConfig
from trl_diffusion.policies.spec import DiffusionSpec
from trl_diffusion.rewards import sudoku
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import PackedLayout, pack
from trl_diffusion.scoring.score import score
from trl_diffusion.trajectories.trajectory import TrajectoryBatch
from trl_diffusion.utils import seeded


LENGTH, BLOCK, TOGETHER = 17, 8, 16
DROPPED = -1
SETTINGS = {  # precision while decoding, while scoring, and what else happens while decoding
    "float32": (torch.float32, torch.float32, None),
    "bfloat16": (torch.bfloat16, torch.bfloat16, None),
    "bfloat16, scored in float32": (torch.bfloat16, torch.float32, None),
    "noisy router": (torch.float32, torch.float32, "noise"),
    "capacity": (torch.float32, torch.float32, "capacity"),
}


def make_policy(tokenizer, has_experts: bool, seed: int) -> PreTrainedModel:
    layers = 4
    config = LLaDA2MoeConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=64, n_group=4, topk_group=2,
        first_k_dense_replace=1 if has_experts else layers, max_position_embeddings=128, block_size=BLOCK,
        mask_token_id=tokenizer.mask_token_id, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with seeded(seed):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def pretrain(model: PreTrainedModel, tokenizer, updates: int, seed: int) -> float:
    """Teaches a policy right answers. Returns its last loss."""
    rows = sudoku.generate(4000, seed, exclude=sudoku.evaluation_puzzles())
    documents = Dataset.from_list(
        [{"prompt": sudoku.prompt(row["puzzle"]), "completion": row["solution"]} for row in rows]
    )
    with tempfile.TemporaryDirectory() as directory:
        args = DiffusionSFTConfig(
            directory, per_device_train_batch_size=64, max_steps=updates, learning_rate=2e-3, lr_scheduler_type="cosine",
            warmup_steps=updates // 10, num_masks=2, seed=seed, bf16=False, gradient_checkpointing=False, logging_steps=updates,
            save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True,
        )  # fmt: skip
        trainer = DiffusionSFTTrainer(model=model, args=args, train_dataset=documents, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    return next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)


@dataclass
class Experts:
    """
    The experts of tokens.

    Attributes:
        chosen (`list[Tensor]`): for each layer with experts, the experts of each token of the present pass, `(N, k)`.
        given (`list[Tensor]`, *optional*): the experts that tokens went to before, likewise. A row of -2 leaves the choice to the router.
        is_replayed (`bool`): whether tokens must go to these experts.
        changed, all (`int`): tokens, in all layers, that were given other experts than the router would have chosen, and tokens.
    """

    chosen: list[Tensor] = field(default_factory=list)
    given: list[Tensor] | None = None
    is_replayed: bool = False
    changed: int = 0
    all: int = 0


@contextmanager
def watched(model: nn.Module, disturb: str | None, args, experts: Experts, seed: int = 0) -> Iterator[None]:
    """Inside, `experts` knows and decides where tokens go. `disturb` changes the choice: `"noise"` or `"capacity"`."""
    noise = torch.Generator().manual_seed(seed)

    def hook(layer: int, gate: nn.Module, inputs, output):
        logits, weights, chosen = output
        if experts.given is not None:
            given = experts.given[layer]
            decided = given[:, :1] != -2
            differs = (given.sort(1).values != chosen.sort(1).values).any(1) & decided[:, 0]
            experts.changed += int(differs.sum())
            experts.all += int(decided.sum())
            if experts.is_replayed:
                chosen = torch.where(decided, given, chosen)
        weights = gate_weights(gate, logits, chosen)
        if disturb == "capacity":
            dropped = over_capacity(weights, chosen, gate.num_experts, args.capacity)
            chosen, weights = chosen.masked_fill(dropped, DROPPED), weights.masked_fill(dropped, 0.0)
        experts.chosen.append(chosen)
        return logits, weights, chosen.clamp(min=0)

    def disturbed(gate: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if disturb != "noise":
            return None
        (hidden,) = inputs
        return (hidden + args.noise * hidden.std() * torch.randn(hidden.shape, generator=noise),)

    gates = [module for module in model.modules() if type(module).__name__ == "Glm4MoeTopkRouter"]
    handles = [
        gate.register_forward_hook(lambda *parts, layer=layer: hook(layer, *parts)) for layer, gate in enumerate(gates)
    ]
    handles += [gate.register_forward_pre_hook(disturbed) for gate in gates]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gate_weights(gate: nn.Module, logits: Tensor, chosen: Tensor) -> Tensor:
    """The weights of chosen experts, as the router of LLaDA 2 computes them. A dropped one has weight 0."""
    weights = logits.sigmoid().gather(1, chosen.clamp(min=0))
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * gate.routed_scaling_factor
    return weights.masked_fill(chosen == DROPPED, 0.0)


def over_capacity(weights: Tensor, chosen: Tensor, num_experts: int, factor: float) -> Tensor:
    """Places `(N, k)` of tokens that an expert has no room for."""
    room = math.ceil(factor * chosen.numel() / num_experts)
    order = weights.flatten().sort(descending=True, stable=True).indices
    experts = chosen.flatten()[order]
    places = (torch.nn.functional.one_hot(experts, num_experts).cumsum(0)).gather(1, experts[:, None])[:, 0]
    dropped = torch.zeros_like(order, dtype=torch.bool)
    dropped[order] = places > room
    return dropped.view_as(chosen)


@torch.no_grad()
def answers(
    model, prompts: list[list[int]], disturb: str | None, args, seed: int
) -> tuple[TrajectoryBatch, list[list]]:
    """Answers prompts one at a time. Beside the answers: for each pass, the positions that it ran and their experts."""
    experts, batches, passes = Experts(), [], []
    settings = DecodingConfig(LENGTH, 1.0, tokens_per_step=2, strategy="entropy")
    own: list[tuple[Tensor, list[Tensor]]] = []
    decode(model, prompts[:1], settings, seeds=[0])  # a policy is tried out before it is used first

    def after(module, inputs, options, output):
        own.append((options["position_ids"][0], list(experts.chosen)))
        experts.chosen.clear()

    handle = model.register_forward_hook(after, with_kwargs=True)
    with watched(model, disturb, args, experts, seed):
        for number, prompt in enumerate(prompts):
            batches.append(decode(model, [prompt], settings, seeds=[1000 * seed + number]))
            passes.append(list(own))
            own.clear()
    handle.remove()
    return TrajectoryBatch.concatenate(batches), passes


def recorded_experts(
    layout: PackedLayout, batch: TrajectoryBatch, spec: DiffusionSpec, passes: list[list]
) -> list[Tensor]:
    """For each layer, the experts that every token of the packed rows went to while its answer was decoded, `(R * N, k)`."""
    layers = len(passes[0][0][1])
    given = [[] for _ in range(layers)]
    for row, own in enumerate(passes):
        first = int(batch.prompt_lengths[row])
        steps = {first + cell: step for cell, step in enumerate(batch.steps[row].tolist()) if step >= 0}
        by_block: dict[int, set[int]] = {}
        for position, step in steps.items():
            by_block.setdefault(position // spec.block_size, set()).add(step)
        order = [(block, step) for block in sorted(by_block) for step in sorted(by_block[block])]
        assert len(order) == len(own), "every pass writes something"
        at = {pair: number for number, pair in enumerate(order)}
        # Copies of a row, in the order of the packed layout: view by view, a view shows the same step of all blocks.
        copies = sorted(order, key=lambda pair: (pair[1], pair[0]))
        where = [{int(position): place for place, position in enumerate(one[0])} for one in own]
        last = {position: number for number, places in enumerate(where) for position in places}
        for copy, position, valid in zip(
            layout.allowed.copies.tolist(), layout.position_ids[row].tolist(), layout.allowed.valid[row].tolist(), strict=True
        ):  # fmt: skip
            number = (last.get(position) if copy == 0 else at[copies[copy - 1]]) if valid else None
            for layer in range(layers):
                found = own[0][1][layer][:1] * 0 - 2
                if number is not None:
                    place = where[number][position]
                    found = own[number][1][layer][place : place + 1]
                given[layer].append(found)
    return [torch.cat(one) for one in given]


@torch.no_grad()
def gaps(
    model, batch: TrajectoryBatch, spec: DiffusionSpec, passes: list[list], args, replay: bool
) -> dict[str, float]:
    """Differences between recorded and re-scored log-probabilities, of counted tokens."""
    found, experts = [], Experts(is_replayed=replay)
    for first in range(0, len(batch), TOGETHER):
        part = batch.select(torch.arange(first, min(first + TOGETHER, len(batch))))
        states = ESTIMATORS["exact"].states(part, spec, [0] * len(part), EstimatorConfig("exact"))
        layout = pack(part, spec, states)
        experts.chosen.clear()
        if passes[0][0][1]:
            experts.given = recorded_experts(layout, part, spec, passes[first : first + TOGETHER])
        with watched(model, None, args, experts):
            logps, _ = score(model, layout, spec)
        counted = states.weights > 0
        found.append((logps - part.logps)[counted].abs())
    gap = torch.cat(found)
    row = {"mean": gap.mean().item(), "p99": gap.quantile(0.99).item(), "max": gap.max().item(), "tokens": len(gap)}
    if experts.all:
        row["tokens_with_other_experts"] = experts.changed / experts.all
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each is another policy")
    parser.add_argument("--updates", type=int, default=600, help="of pretraining")
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--noise", type=float, default=0.02)
    parser.add_argument("--capacity", type=float, default=2.0)
    parser.add_argument("--json", action="store_true", help="print all results as one JSON object on the last line")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path(), trust_remote_code=False)
    puzzles = sudoku.evaluation_puzzles()[: args.answers]
    prompts = [tokenizer(sudoku.prompt(puzzle))["input_ids"] for puzzle in puzzles]
    rows = []
    for seed in args.seeds:
        for has_experts in (True, False):
            model = make_policy(tokenizer, has_experts, seed)
            spec = get_spec(model.config)
            loss = pretrain(model, tokenizer, args.updates, seed) if args.updates else None
            for name, (while_decoding, while_scoring, disturb) in SETTINGS.items():
                if disturb and not has_experts:
                    continue
                batch, passes = answers(model.to(while_decoding), prompts, disturb, args, seed)
                model.to(while_scoring)
                for replay in (False, True) if has_experts else (False,):
                    found = gaps(model, batch, spec, passes, args, replay)
                    rows.append({"seed": seed, "experts": has_experts, "setting": name, "replay": replay,
                                 "loss": loss, **found})  # fmt: skip
                    print(json.dumps(rows[-1]), flush=True)
                model.float()
    print("\n" + table(rows))
    if args.json:
        print(json.dumps({"rows": rows}))


def table(rows: list[dict]) -> str:
    lines = ["| setting | experts | replay | tokens with other experts | gap: mean | 99 % | max |", "|---" * 7 + "|"]
    for key in dict.fromkeys((row["setting"], row["experts"], row["replay"]) for row in rows):
        own = [row for row in rows if (row["setting"], row["experts"], row["replay"]) == key]
        other = [row["tokens_with_other_experts"] for row in own if "tokens_with_other_experts" in row]
        cells = [f"{statistics.mean(row[name] for row in own):.2g}" for name in ("mean", "p99")]
        cells.append(f"{max(row['max'] for row in own):.2g}")
        share = f"{statistics.mean(other):.2%}" if other else ""
        lines.append(
            f"| {key[0]} | {'yes' if key[1] else 'no'} | {'yes' if key[2] else ''} | {share} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
