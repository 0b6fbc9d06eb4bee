"""
Rebuilds the embedded policies: models that have read some puzzles and are still bad at solving them.

    python recipes/pretrain_tiny.py --output_dir tiny
    python recipes/pretrain_tiny.py --output_dir full --policy full
    python recipes/pretrain_tiny.py --output_dir revising --policy revising

`block`, the default, is a block-diffusion policy. A stock Qwen3 backbone with a character-level tokenizer is trained with the block-diffusion objective (mask some tokens
of every block, predict them, all blocks in one packed pass) on 4x4 sudokus and countdown puzzles written by two kinds
of authors, as in any corpus: careful ones, who solve the puzzle, and careless ones, whose answers look right and are
not. What the policy has to learn by reinforcement afterwards is to be careful.

`full` and `revising` have full attention over the whole answer, and know 4x4 sudokus with two clues only, all of them solved
with care. `revising` was also shown wrong tokens: a share of the visible ones, between 0 and 10 % and another one for each
answer, is replaced by tokens of other answers, and it predicts every position, not only the masked ones. What it predicts at a
visible position therefore says how likely the visible token is, which a decoder that revises needs.

`block` takes about 15 minutes on 2 CPU cores, each of the others about 4.
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trl_diffusion.decoding.config import DecodingConfig
from trl_diffusion.decoding.decode import decode
from trl_diffusion.policies.files import check_one_policy
from trl_diffusion.policies.spec import DiffusionSpec, set_spec
from trl_diffusion.rewards import countdown, sudoku
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score
from trl_diffusion.scoring.states import States
from trl_diffusion.trajectories.trajectory import TrajectoryBatch, response_blocks
from trl_diffusion.utils import check_writable, errors_in_a_line


SPECIAL = ["<pad>", "<mask>", "<eos>", "<unk>"]
CONTEXT = 512
CLUES = 2  # of the sudokus that the policies with full attention know
CORRUPTION = 0.1  # largest share of visible tokens that the revising policy is shown wrong


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character and the newline, after the special tokens."""
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        mask_token="<mask>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_spec(tokenizer: PreTrainedTokenizerFast, policy: str) -> DiffusionSpec:
    """Blocks of 8 characters, or the whole answer to a sudoku (16 digits and a stop token) at once."""
    spec = DiffusionSpec(mask_token_id=tokenizer.mask_token_id, block_size=8, stop_token_ids=(tokenizer.eos_token_id,))
    if policy == "block":
        return spec
    revises = policy == "revising"
    return spec.replace(attention="full", block_size=17, block_origin="response", predicts_visible_tokens=revises)


def build_model(
    tokenizer: PreTrainedTokenizerFast, spec: DiffusionSpec, hidden_size: int, num_layers: int
) -> Qwen3ForCausalLM:
    """A randomly initialised policy."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=hidden_size // 4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    set_spec(config, spec)
    return Qwen3ForCausalLM(config)


def careless_sudoku(puzzle: str) -> str:
    """Fills blanks from left to right with the smallest digit that its row does not have yet."""
    cells = list(puzzle)
    for cell, digit in enumerate(cells):
        if digit == "0":
            row = cells[cell - cell % 4 : cell - cell % 4 + 4]
            cells[cell] = min(set(sudoku.DIGITS) - set(row))
    return "".join(cells)


def careless_countdown(numbers: list[int], rng: random.Random) -> str:
    """Joins the numbers in the given order with arbitrary signs."""
    return str(numbers[0]) + "".join(rng.choice("+-") + str(number) for number in numbers[1:])


def make_corpus(size: int, carelessness: float, seed: int) -> list[tuple[str, str]]:
    """Pairs of a prompt and an answer, half sudoku and half countdown."""
    rng = random.Random(seed)
    corpus = []
    for row in sudoku.generate(size // 2, seed, exclude=sudoku.evaluation_puzzles()):
        careless = rng.random() < carelessness
        answer = careless_sudoku(row["puzzle"]) if careless else row["solution"]
        corpus.append((sudoku.prompt(row["puzzle"]), answer))
    for game in countdown.generate(size - size // 2, seed, exclude=countdown.evaluation_keys()):
        careless = rng.random() < carelessness
        answer = careless_countdown(game["numbers"], rng) if careless else game["solution"]
        corpus.append((countdown.prompt(game["numbers"], game["target"]), answer))
    rng.shuffle(corpus)
    return corpus


def make_solutions(size: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of a prompt with a 4x4 sudoku of two clues, and one of its solutions."""
    rng, kept = random.Random(seed), set(sudoku.evaluation_puzzles(16 - CLUES))
    pairs: list[tuple[str, str]] = []
    while len(pairs) < size:
        grid, clues = rng.choice(sudoku.all_grids()), rng.sample(range(16), CLUES)
        puzzle = "".join(digit if cell in clues else "0" for cell, digit in enumerate(grid))
        if puzzle not in kept:
            pairs.append((sudoku.prompt(puzzle), grid))
    return pairs


def collate(
    pairs: list[tuple[str, str]], tokenizer, spec: DiffusionSpec, generator: torch.Generator
) -> tuple[TrajectoryBatch, States]:
    """
    A batch in which every block has a random share of its response tokens masked. Without `spec.predicts_visible_tokens`, the
    masked tokens are scored. With it, all tokens are, and some of the visible ones are shown wrong.
    """
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
    answers = [tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id] for _, answer in pairs]
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    lengths = spec.canvas_end(prompt_lengths, torch.tensor([len(answer) for answer in answers])) - prompt_lengths
    prompt_width, width = max(map(len, prompts)), int(lengths.max())
    prompt_ids = torch.full((len(pairs), prompt_width), tokenizer.pad_token_id)
    canvas = torch.full((len(pairs), width), tokenizer.eos_token_id)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        prompt_ids[row, prompt_width - len(prompt) :] = torch.tensor(prompt)
        canvas[row, : len(answer)] = torch.tensor(answer)
    blocks = response_blocks(spec, prompt_lengths, width)
    ratio = torch.rand(len(pairs), int(blocks.max()) + 1, generator=generator).gather(1, blocks)
    masked = torch.rand(canvas.shape, generator=generator) < ratio
    inside = torch.arange(width) < lengths[:, None]
    batch = TrajectoryBatch(
        prompt_ids=prompt_ids,
        prompt_mask=(torch.arange(prompt_width) >= (prompt_width - prompt_lengths)[:, None]).long(),
        canvas_ids=canvas,
        steps=inside.long() - 1,
        logps=torch.zeros(canvas.shape),
        canvas_lengths=lengths,
        completion_lengths=lengths,
    )
    if not spec.predicts_visible_tokens:
        scored = (masked & inside).float()
        return batch, States(masked[:, None], scored[:, None], scored)
    share = CORRUPTION * torch.rand(len(pairs), 1, generator=generator)
    wrong = torch.rand(canvas.shape, generator=generator) < share
    others = canvas.flatten()[torch.randperm(canvas.numel(), generator=generator)].view_as(canvas)
    scored = inside.float()
    return batch, States(masked[:, None], scored[:, None], scored, shown=torch.where(wrong, others, canvas)[:, None])


def solve_rate(model, tokenizer, prompts: list[str], check, config: DecodingConfig) -> float:
    """Share of prompts whose decoded answer passes `check(index, answer)`."""
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    batch = decode(model, ids, config, seeds=list(range(len(ids))))
    answers = tokenizer.batch_decode(batch.completions(), skip_special_tokens=True)
    return sum(check(index, answer) for index, answer in enumerate(answers)) / len(answers)


def checks(policy: str) -> dict:
    """Prompts to measure a policy with, and what is a right answer to them, by name."""
    puzzles = sudoku.evaluation_puzzles(8 if policy == "block" else 16 - CLUES)[:200]
    found = {"sudoku": ([sudoku.prompt(p) for p in puzzles], lambda i, answer: sudoku.is_solved(puzzles[i], answer))}
    if policy == "block":
        games = countdown.evaluation_games()[:200]
        found["countdown"] = (
            [countdown.prompt(g["numbers"], g["target"]) for g in games],
            lambda i, answer: countdown.is_solved(answer, games[i]["numbers"], games[i]["target"]),
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="tiny", help="where to save the model and its tokenizer")
    parser.add_argument("--policy", choices=("block", "full", "revising"), default="block", help="which one")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps (1500; 800 with full attention)")
    parser.add_argument("--batch_size", type=int, default=128, help="answers per step")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--hidden_size", type=int, default=None, help="128; 64 with full attention")
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument(
        "--carelessness", type=float, default=0.6, help="share of answers by careless authors (`block`)"
    )
    parser.add_argument("--corpus_size", type=int, default=100_000, help="answers in the corpus")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with errors_in_a_line():
        check_writable(args.output_dir, "--output_dir")
        check_one_policy(args.output_dir, adapter=False)

    torch.manual_seed(args.seed)
    is_block = args.policy == "block"
    steps = args.steps or (1500 if is_block else 800)
    tokenizer = build_tokenizer()
    spec = build_spec(tokenizer, args.policy)
    model = build_model(tokenizer, spec, args.hidden_size or (128 if is_block else 64), args.num_layers)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    corpus = make_solutions(args.corpus_size, args.seed)
    if is_block:
        corpus = make_corpus(args.corpus_size, args.carelessness, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, steps, pct_start=0.1)
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)

    started = time.perf_counter()
    bar = tqdm(range(steps), desc="pretraining", unit="step")
    for step in bar:
        model.train()
        batch, states = collate(rng.sample(corpus, args.batch_size), tokenizer, spec, generator)
        layout = pack(batch, spec, states)
        logps, _ = score(model, layout, spec)
        loss = -logps.sum() / (layout.weights > 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            model.eval()
            rates = [f"loss {loss.item():.3f}"]
            for name, (prompts, check) in checks(args.policy).items():
                for temperature in (0.0, 1.0):
                    config = DecodingConfig(24 if is_block else 17, temperature, tokens_per_step=2)
                    rate = solve_rate(model, tokenizer, prompts, check, config)
                    rates.append(f"{name} {rate:.1%} (temperature {temperature:g})")
            tqdm.write(f"step {step + 1}, {time.perf_counter() - started:.0f} s: " + ", ".join(rates))

    model.eval().save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"saved in {args.output_dir}")


if __name__ == "__main__":
    main()
