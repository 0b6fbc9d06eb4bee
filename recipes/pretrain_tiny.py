"""
Rebuilds the embedded policies: models that have read some puzzles and are still bad at solving them.

    python recipes/pretrain_tiny.py --output_dir tiny
    python recipes/pretrain_tiny.py --output_dir full --policy full
    python recipes/pretrain_tiny.py --output_dir revising --policy revising

`block`, the default, is a block-diffusion policy: a stock Qwen3 backbone with a character-level tokenizer. `DiffusionSFTTrainer` trains
it, with the same weight for all masked tokens, on 4x4 sudokus and countdown puzzles written by two kinds of authors, as in any
corpus: careful ones, who solve the puzzle, and careless ones, whose answers look right and are not. What the policy has to learn
by reinforcement afterwards is to be careful.

`full` and `revising` have full attention over the whole answer, and know 4x4 sudokus with two clues only, all of them solved
with care. `revising` was also shown wrong tokens (`max_corruption`): a share of the visible ones, between 0 and 10 % and another one for
each answer, is replaced by other tokens of the answer, and it predicts every position, not only the masked ones. What it predicts at a
visible position therefore says how likely the visible token is, which a decoder that revises needs.

`block` takes about 15 minutes on 2 CPU cores, each of the others about 4.
"""

from __future__ import annotations

import argparse
import random
import time

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, TrainerCallback

from trl_diffusion import DecodingConfig, DiffusionSFTConfig, DiffusionSFTTrainer, generate
from trl_diffusion.policies.files import check_one_policy
from trl_diffusion.policies.small import CONTEXT, random_model, small_config
from trl_diffusion.policies.spec import DiffusionSpec
from trl_diffusion.rewards import countdown, sudoku
from trl_diffusion.sft.documents import IGNORED
from trl_diffusion.utils import check_writable, errors_in_a_line


SPECIAL = ["<pad>", "<mask>", "<eos>", "<unk>"]
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


def to_documents(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Pairs as documents of tokens. Of a pair, the answer and its stop token are trained."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    answers = tokenizer([f"{answer}{tokenizer.eos_token}" for _, answer in pairs])["input_ids"]
    both = list(zip(prompts, answers, strict=True))
    return Dataset.from_dict(
        {
            "input_ids": [prompt + answer for prompt, answer in both],
            "labels": [len(prompt) * [IGNORED] + answer for prompt, answer in both],
        }
    )


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


class Measurement(TrainerCallback):
    """Lets the policy answer every 250 steps and after the last one, and prints the shares of right answers."""

    def __init__(self, policy: str, tokenizer: PreTrainedTokenizerFast):
        self.policy, self.tokenizer, self.started = policy, tokenizer, time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % 250 and state.global_step < state.max_steps:
            return
        rates = []
        for name, (prompts, check) in checks(self.policy).items():
            for temperature in (0.0, 1.0):
                config = DecodingConfig(24 if self.policy == "block" else 17, temperature, tokens_per_step=2)
                answers = generate(model, self.tokenizer, prompts, config).texts
                rate = sum(check(index, answer) for index, answer in enumerate(answers)) / len(answers)
                rates.append(f"{name} {rate:.1%} (temperature {temperature:g})")
        tqdm.write(f"step {state.global_step}, {time.perf_counter() - self.started:.0f} s: {', '.join(rates)}")


def build_trainer(args: argparse.Namespace) -> DiffusionSFTTrainer:
    """The trainer of a randomly initialised policy on its corpus."""
    is_block = args.policy == "block"
    tokenizer = build_tokenizer()
    hidden_size = args.hidden_size or (128 if is_block else 64)
    backbone = small_config(tokenizer, hidden_size, args.num_layers, build_spec(tokenizer, args.policy))
    model = random_model(backbone, args.seed)
    corpus = (
        make_corpus(args.corpus_size, args.carelessness, args.seed)
        if is_block
        else make_solutions(args.corpus_size, args.seed)
    )
    steps = args.steps or (1500 if is_block else 800)
    config = DiffusionSFTConfig(
        args.output_dir,
        weighting="mean",
        max_corruption=CORRUPTION if args.policy == "revising" else 0.0,
        per_device_train_batch_size=args.batch_size,
        max_length=None,
        max_steps=steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.01,
        seed=args.seed,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
    )
    return DiffusionSFTTrainer(
        model=model,
        args=config,
        train_dataset=to_documents(corpus, tokenizer),
        processing_class=tokenizer,
        callbacks=[Measurement(args.policy, tokenizer)],
    )


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

    trainer = build_trainer(args)
    print(f"{trainer.model.num_parameters():,} parameters")
    trainer.train()
    trainer.model.eval().save_pretrained(args.output_dir)
    build_tokenizer().save_pretrained(args.output_dir)
    print(f"saved in {args.output_dir}")


if __name__ == "__main__":
    main()
