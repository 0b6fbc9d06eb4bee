"""
dTRPO on one page: a small diffusion language model learns 4x4 sudoku (`python recipes/dtrpo_loop.py`).

This file is the method without the trainer: PyTorch, a stock model of transformers with block attention, and a reward. It
caches nothing and skips nothing. `DTRPOTrainer` computes the same numbers faster; tests/scoring/test_one_page.py compares
the two. Sections are those of docs/method.md; the paper is https://huggingface.co/papers/2603.18806.

A sequence is a prompt and, after it, the canvas on which the response is denoised. Shapes have one letter per dimension:
    R  responses           C  canvas positions         T  denoising steps of a block   N  packed tokens, 2 (P + C)
    P  prompt positions    S  blocks of the response   V  entries of the vocabulary
"""

import argparse
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_diffusion import DiffusionSpec, get_spec, tiny_policy_path
from trl_diffusion.rewards import sudoku


class Trajectories(NamedTuple):
    """What is remembered of R responses (section 1). Each tensor has shape (R, P + C)."""

    tokens: Tensor  # the tokens after the last step
    blocks: Tensor  # block 0 holds the first response token; negative blocks hold nothing but prompt
    steps: Tensor  # the denoising step of its block that unmasked the token, from 0; -1 in the prompt
    logps: Tensor  # the log-probability of the token at that step, float32; 0 in the prompt
    completion: Tensor  # True for the tokens of the response up to its first stop token: the answer
    counted: Tensor  # True for these, and for tokens that the policy saw while it wrote them (section 3.1)
    autoregressive: Tensor  # True for those of them that were made autoregressively (section 3.4)


def number_blocks(spec: DiffusionSpec, prompt_lengths: Tensor, width: int) -> Tensor:
    """The block of each position, (R, width); counted from the start of the sequence, or of the response (section 3.2)."""
    positions, lengths = torch.arange(width), prompt_lengths[:, None]
    if spec.block_origin == "sequence":
        return positions // spec.block_size - lengths // spec.block_size
    return ((positions - lengths) // spec.block_size).clamp(min=-1)


def log_distributions(policy: nn.Module, spec: DiffusionSpec, tokens: Tensor, places: Tensor, sees: Tensor) -> Tensor:
    """
    The policy's log-distribution at each of N places, (R, N, V), float32, from one forward pass: tokens (R, N); places (N,)
    in their sequence; sees (R, N, N), True where the first token sees the second. The mask token has no share (section 3.6).
    """
    output = policy(tokens, position_ids=places[None], attention_mask=sees[:, None], use_cache=False)
    return output.logits.float().index_fill(2, torch.tensor(spec.mask_token_id), -torch.inf).log_softmax(2)


@torch.no_grad()
def denoise(
    policy: nn.Module, spec: DiffusionSpec, prompts: list[list[int]], S: int, per_step: int, rng: Generator | None
) -> Trajectories:
    """
    Denoises S blocks for each of R prompts, `per_step` tokens a step, and remembers how (section 1). A position sees its own
    block and the blocks before it. Tokens are sampled; without a random generator, the likeliest are taken.
    """
    mask, lengths = spec.mask_token_id, torch.tensor([len(prompt) for prompt in prompts])
    blocks = number_blocks(spec, lengths, int(lengths.max()) + S * spec.block_size)
    blocks = blocks[:, (blocks < S).any(0)]  # (R, P + C)
    places, sees = torch.arange(blocks.shape[1]), blocks[:, :, None] >= blocks[:, None]
    # True at the first token of a block, if it is autoregressive: a step of its own unmasks it, before the others.
    first = (blocks != blocks.roll(1, 1)) & (spec.first_token == "autoregressive")
    tokens = torch.tensor([prompt + [mask] * (len(places) - len(prompt)) for prompt in prompts])
    steps, logps = torch.full_like(tokens, -1), torch.zeros(tokens.shape)
    for s in range(S):
        t = 0
        while (masked := (blocks == s) & (tokens == mask)).any():
            log_probs = log_distributions(policy, spec, tokens, places, sees)  # (R, P + C, V)
            if spec.token_shift:  # position i is predicted at position i - 1 (section 3.3)
                log_probs = log_probs.roll(1, 1)
            masked = torch.where((masked & first).any(1, keepdim=True), masked & first, masked)
            probs = log_probs.exp().flatten(0, 1)
            proposed = (probs.argmax(1) if rng is None else probs.multinomial(1, generator=rng)).view_as(tokens)
            # The surest positions are unmasked, whichever tokens were sampled, so the choice adds nothing to the gradient.
            sureness = log_probs.amax(2).masked_fill(~masked, -torch.inf)
            chosen = masked & torch.zeros_like(masked).scatter(1, sureness.topk(per_step).indices, True)
            tokens, steps = torch.where(chosen, proposed, tokens), torch.where(chosen, t, steps)
            logps = torch.where(chosen, log_probs.gather(2, proposed[..., None]).squeeze(2), logps)
            t += 1
    stops = (steps >= 0) & torch.isin(tokens, torch.tensor(spec.stop_token_ids))
    completion = (steps >= 0) & (stops.cumsum(1) - stops.long() == 0)  # no stop token before it
    # Tokens after the stop token count if they were unmasked before the last token of the completion was.
    last = (steps >= 0) & (blocks == blocks.masked_fill(~completion, -1).amax(1, keepdim=True))  # block of its end
    counted = completion | (last & (steps < steps.masked_fill(~(last & completion), -1).amax(1, keepdim=True)))
    return Trajectories(tokens, blocks, steps, logps, completion, counted, counted & first)


def chances(trajectories: Trajectories) -> Tensor:
    """The probability of drawing each step of each block, (R, S, T): 0.9 by recorded surprise, 0.1 evenly (section 2)."""
    _, blocks, steps, logps, _, counted, autoregressive = trajectories
    in_block = blocks[:, None] == torch.arange(int(blocks.max()) + 1)[:, None]  # (R, S, P + C)
    at_step = (steps[:, None] == torch.arange(int(steps.max()) + 1)[:, None]) & (counted & ~autoregressive)[:, None]
    unmasked = (in_block[:, :, None] & at_step[:, None]).float()  # (R, S, T, P + C)
    masses = ((1 - logps.exp())[:, None, None] * unmasked).sum(3), unmasked.amax(3)
    surprise, even = (nn.functional.normalize(mass, p=1.0, dim=2) for mass in masses)
    return torch.where(surprise.sum(2, keepdim=True) > 0, 0.9 * surprise + 0.1 * even, even)


def draw(trajectories: Trajectories, rng: Generator) -> Tensor:
    """State reduction (section 2): draws one step of each block. Returns the step of each position's block, (R, P + C)."""
    likely = chances(trajectories)
    race = likely / torch.empty_like(likely).exponential_(generator=rng)  # its largest entry is a draw by `likely`
    return race.argmax(2).gather(1, trajectories.blocks.clamp(min=0))


def weigh(trajectories: Trajectories, drawn: Tensor) -> Tensor:
    """
    The weight of each token, (R, P + C): 1 / p in a step that is drawn with probability p, else 0. So each token weighs 1 on
    average, and the estimate is unbiased (section 2). Autoregressive tokens are in every pass and weigh 1 (section 3.4).
    """
    likely, rows = chances(trajectories), torch.arange(len(drawn))[:, None]
    weights = 1 / likely[rows, trajectories.blocks.clamp(min=0), drawn.clamp(min=0)]
    scored = trajectories.counted & (trajectories.steps == drawn)
    return torch.where(trajectories.autoregressive, 1.0, torch.where(scored, weights, 0.0))


def pack(spec: DiffusionSpec, trajectories: Trajectories, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    All drawn states, z[s, t_s] of section 1, in one row: the sequence, then a noisy copy of it. In the copy, tokens that were
    unmasked at the drawn step of their block or later are masked. Returns tokens (R, N), places (N,) and sees (R, N, N):
    - a clean token sees the clean tokens of its own block and of the blocks before it, as in `denoise`;
    - a noisy token sees the clean tokens of the blocks before its own, and the noisy tokens of its own block.
    """
    noisy = torch.where(trajectories.steps >= drawn, spec.mask_token_id, trajectories.tokens)
    places, blocks = torch.arange(noisy.shape[1]).repeat(2), trajectories.blocks.repeat(1, 2)
    is_noisy = torch.arange(len(places)) >= noisy.shape[1]
    before, same = blocks[:, :, None] > blocks[:, None], blocks[:, :, None] == blocks[:, None]
    sees = (before & ~is_noisy) | (same & (is_noisy[:, None] == is_noisy))
    return torch.cat([trajectories.tokens, noisy], 1), places, sees


def score(policy: nn.Module, spec: DiffusionSpec, trajectories: Trajectories, drawn: Tensor) -> Tensor:
    """log p(token | drawn state of its block) of each token, (R, P + C), from one forward pass (section 2)."""
    clean, noisy = log_distributions(policy, spec, *pack(spec, trajectories, drawn)).chunk(2, 1)  # (R, P + C, V) each
    if spec.token_shift:  # position i is predicted at position i - 1, clean if i is autoregressive
        noisy = torch.where(trajectories.autoregressive[..., None], clean.roll(1, 1), noisy.roll(1, 1))
    return noisy.gather(2, trajectories.tokens[..., None]).squeeze(2)


def advantages_of(rewards: Tensor, group_size: int) -> Tensor:
    """The reward of each response minus the mean of its group, in standard deviations of the group, (R,) -> (R,)."""
    groups = rewards.view(-1, group_size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def grpo_loss(logps: Tensor, old_logps: Tensor, weights: Tensor, advantages: Tensor, epsilon: float = 0.2) -> Tensor:
    """
    The clipped loss of GRPO, weighted (section 5), from three tensors (R, P + C) and advantages (R,). Ratio reduction
    (section 2): in the ratio of two policies the choice of positions cancels, and the tokens remain.
    """
    ratios = torch.where(weights > 0, logps - old_logps, 0.0).exp()
    gains = torch.min(ratios * advantages[:, None], ratios.clamp(1 - epsilon, 1 + epsilon) * advantages[:, None])
    return -((weights * gains).sum(1) / weights.sum(1)).mean()


def answer(policy, spec, tokenizer, puzzles: list[str], rng: Generator | None) -> tuple[Trajectories, list[str]]:
    """Denoises answers of 16 digits and a stop token, 2 characters a step. Returns their trajectories and texts."""
    prompts = tokenizer([sudoku.prompt(puzzle) for puzzle in puzzles])["input_ids"]
    trajectories = denoise(policy, spec, prompts, S=3, per_step=2, rng=rng)
    answers = [row[kept] for row, kept in zip(trajectories.tokens, trajectories.completion, strict=True)]
    return trajectories, tokenizer.batch_decode(answers, skip_special_tokens=True)


def main(arguments: list[str] | None = None) -> None:
    """Trains the embedded policy, and measures it before and after on puzzles that training never sees."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    for name, default in (("seed", 0), ("updates", 20), ("puzzles", 16), ("answers", 16)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    args = parser.parse_args(arguments)
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy_path(), trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path(), trust_remote_code=False)
    spec = get_spec(policy.config)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    rng, unseen = Generator().manual_seed(args.seed), list(sudoku.evaluation_puzzles())
    before = sudoku.sudoku_solved(answer(policy, spec, tokenizer, unseen, None)[1], unseen)
    for update in range(args.updates):
        rows = sudoku.generate(args.puzzles, seed=1000 * args.seed + update, exclude=unseen)
        puzzles = [row["puzzle"] for row in rows for _ in range(args.answers)]
        trajectories, texts = answer(policy, spec, tokenizer, puzzles, rng)
        solved, units = torch.tensor([sudoku.sudoku_solved(texts, puzzles), sudoku.sudoku_units(texts, puzzles)])
        logps = score(policy, spec, trajectories, drawn := draw(trajectories, rng))
        # The log-probabilities recorded while denoising are the old policy's: they need no pass of their own (section 4).
        weights, advantages = weigh(trajectories, drawn), advantages_of(solved + units, args.answers)
        loss = grpo_loss(logps, trajectories.logps, weights, advantages)
        optimizer.param_groups[0]["lr"] = 6e-4 * (1 - update / args.updates)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        print(f"update {update + 1}: {solved.mean():.1%} solved, {units.mean():.1%} of rows, columns and boxes right")
    after = sudoku.sudoku_solved(answer(policy, spec, tokenizer, unseen, None)[1], unseen)
    print(f"solve rate {torch.tensor(before).mean():.1%} -> {torch.tensor(after).mean():.1%} ({len(unseen)} puzzles)")


if __name__ == "__main__":
    main()
