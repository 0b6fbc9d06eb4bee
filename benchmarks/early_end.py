"""
What the tokens behind the stop token are worth, with full attention: to the gradient, and in seconds.

    python benchmarks/early_end.py --json

Gradient. The answers of a random policy over a canvas of four positions end early: `--stop` is added to the logit of the stop
token. All ways to decode it (random order, one position a step: 24 orders of 81 canvases)
are enumerated, so that the gradient of the expected reward is known. Beside it: the expected gradient of the score that counts
what was unmasked before the completion was settled (this package), of the completion alone, and of every token.

Seconds. Another policy answers prompts on a canvas of 256 positions and stops after 16 to 40 of them, by the bias of its head. Its
rollouts are timed with `stop_rule="token"` and with the whole canvas decoded, in turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from trl_diffusion import DecodingConfig, DiffusionSpec, decode, set_spec
from trl_diffusion.policies.forward import policy_logits
from trl_diffusion.trajectories.trajectory import TrajectoryBatch, counted_writes


CELLS, STOP, MASK, PROMPT = 4, 2, 3, 4  # tokens 0, 1 and 2 are answers
TOKENS = (0, 1, STOP)


def make_policy(seed: int, size: int, layers: int, vocabulary: int, spec: DiffusionSpec) -> nn.Module:
    config = AutoConfig.for_model(
        "qwen3", vocab_size=vocabulary, hidden_size=size, intermediate_size=3 * size, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, head_dim=size // 4, max_position_embeddings=512,
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    set_spec(config, spec)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


# ------------------------------------------------------------------------------------------------------------- gradient


class Canvas:
    """Every state of the canvas of four, and what a policy says in it."""

    def __init__(self, policy: nn.Module, stop: float):
        self.policy, self.offset = policy.double(), torch.tensor([0.0, 0.0, stop], dtype=torch.float64)
        self.spec = DiffusionSpec(
            MASK, attention="full", block_size=CELLS, block_origin="response", stop_token_ids=(STOP,)
        )
        self.states = list(itertools.product((*TOKENS, MASK), repeat=CELLS))
        self.numbers = {state: number for number, state in enumerate(self.states)}

    def log_probs(self) -> Tensor:
        """`(states, cells, tokens)`, with a graph."""
        ids = torch.tensor([(PROMPT, *state) for state in self.states])
        rows, columns = (
            part.flatten()
            for part in torch.meshgrid(torch.arange(len(ids)), torch.arange(1, 1 + CELLS), indexing="ij")
        )
        allowed = torch.ones(len(ids), 1, 1, 1 + CELLS, dtype=torch.bool)
        positions = torch.arange(1 + CELLS).expand(len(ids), -1)
        logits = policy_logits(self.policy, ids, positions, allowed, rows, columns)[:, : len(TOKENS)]
        return (logits + self.offset).log_softmax(-1).view(len(ids), CELLS, len(TOKENS))

    def decodings(self) -> TrajectoryBatch:
        """Every order and every canvas."""
        orders = list(itertools.permutations(range(CELLS)))
        pairs = [(order, canvas) for order in orders for canvas in itertools.product(TOKENS, repeat=CELLS)]
        canvases = torch.tensor([canvas for _, canvas in pairs])
        stops = [canvas.index(STOP) + 1 if STOP in canvas else CELLS for _, canvas in pairs]
        ones = torch.ones(len(pairs), 1, dtype=torch.long)
        return TrajectoryBatch(
            ones * PROMPT, ones, canvases, torch.tensor([order for order, _ in pairs]), torch.zeros(canvases.shape),
            torch.full((len(pairs),), CELLS), torch.tensor(stops),
        )  # fmt: skip

    def writes(self, log_probs: Tensor, batch: TrajectoryBatch) -> Tensor:
        """Log-probability of each token when it was unmasked, `(R, 4)`."""
        hidden = batch.steps[:, None, :] >= batch.steps[:, :, None]  # (R, cell that is written, cell)
        seen = torch.where(hidden, MASK, batch.canvas_ids[:, None, :])
        base = torch.tensor([4**power for power in range(CELLS - 1, -1, -1)])
        return log_probs[(seen * base).sum(-1), torch.arange(CELLS), batch.canvas_ids]


def gradients(seed: int, stop: float) -> dict[str, dict[str, float]]:
    canvas = Canvas(make_policy(seed, 16, 2, 5, DiffusionSpec(MASK, attention="full")), stop)
    batch = canvas.decodings()
    parameters = [parameter for parameter in canvas.policy.parameters() if parameter.requires_grad]

    def gradient(objective: Tensor, graph: Tensor) -> Tensor:
        found = torch.autograd.grad(objective, graph, retain_graph=True)
        return found[0].flatten()

    # The table of log-probabilities has the gradient first; the parameters' is a linear function of it.
    table = canvas.log_probs()
    writes = canvas.writes(table, batch)
    chances = writes.sum(1).exp() / 24
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(4**CELLS, generator=generator, dtype=torch.float64)
    kept = torch.where(batch.completion_mask, batch.canvas_ids + 1, 0)
    rewards = values[(kept * torch.tensor([64, 16, 4, 1])).sum(1) % 4**CELLS]

    def of_parameters(of_table: Tensor) -> Tensor:
        found = torch.autograd.grad(table, parameters, of_table.view_as(table), retain_graph=True)
        return torch.cat([one.flatten() for one in found])

    exact = of_parameters(gradient((chances * rewards).sum(), table))
    weights = (chances * (rewards - (chances * rewards).sum())).detach()
    counted = counted_writes(canvas.spec, batch)
    rows = {"until settled": counted, "completion": batch.completion_mask, "all": torch.ones_like(counted)}
    figures = {}
    for name, mask in rows.items():
        mean = of_parameters(gradient((weights * (writes * mask).sum(1)).sum(), table))
        figures[name] = {
            "error": ((mean - exact).norm() / exact.norm()).item(),
            "cosine": torch.cosine_similarity(mean, exact, dim=0).item(),
            "tokens": (chances.detach() * mask.sum(1)).sum().item(),
        }
    return figures


# -------------------------------------------------------------------------------------------------------------- seconds


def rollouts(block_size: int, strategy: str, responses: int, repeats: int) -> dict[str, float]:
    vocabulary, canvas = 1024, 256
    spec = DiffusionSpec(
        vocabulary - 1, attention="full", block_size=block_size, block_origin="response", stop_token_ids=(0,)
    )
    policy = make_policy(0, 256, 4, vocabulary, spec).eval()
    head = nn.Linear(256, vocabulary, bias=True)
    with torch.no_grad():
        head.weight.copy_(policy.get_output_embeddings().weight / 4)
        head.bias.zero_()
        head.bias[0] = 3.0
    policy.set_output_embeddings(head)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, vocabulary - 1, (responses, 32), generator=generator).tolist()
    seconds: dict[str, list[float]] = {"token": [], "block": []}
    lengths = []
    for _ in range(repeats):
        for rule in seconds:
            decoding = DecodingConfig(canvas, 1.0, strategy=strategy, tokens_per_step=2, stop_rule=rule)
            begin = time.perf_counter()
            batch = decode(policy, prompts, decoding, spec, seeds=list(range(responses)))
            seconds[rule].append(time.perf_counter() - begin)
            lengths.append(batch.completion_lengths.float().mean().item())
    early, whole = (statistics.median(seconds[rule]) for rule in ("token", "block"))
    return {"length": statistics.mean(lengths), "early": early, "whole": whole, "ratio": early / whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stop", type=float, default=1.0, help="what is added to the logit of the stop token")
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object on the last line")
    args = parser.parse_args()
    torch.set_num_threads(2)
    found = {"gradients": [{"seed": seed, **gradients(seed, args.stop)} for seed in args.seeds], "rollouts": []}
    print("| seed | writes that count | relative error | cosine | tokens that count |\n|---|---|---|---|---|")
    for row in found["gradients"]:
        for name, figures in row.items():
            if name != "seed":
                print(
                    f"| {row['seed']} | {name} | {figures['error']:.1e} | {figures['cosine']:.3f} | {figures['tokens']:.2f} |"
                )
    print(
        "\n| block | strategy | tokens of an answer | seconds, early end | whole canvas | ratio |\n|---|---|---|---|---|---|"
    )
    for block_size, strategy in itertools.product((256, 32), ("left_to_right", "confidence")):
        row = {
            "block": block_size,
            "strategy": strategy,
            **rollouts(block_size, strategy, args.responses, args.repeats),
        }
        found["rollouts"].append(row)
        print(
            f"| {block_size} | {strategy} | {row['length']:.0f} | {row['early']:.1f} | {row['whole']:.1f} | {row['ratio']:.2f} |"
        )
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
