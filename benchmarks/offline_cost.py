"""
What a step on stored responses costs, beside the scoring step of online training, in one run.

    python benchmarks/offline_cost.py --threads 2 --json

Model, lengths and batch are those of training_cost.py. Both steps are the trainer's own, forward, backward and AdamW:

- `online`: a rollout has been made; its scoring step, without a reference (`beta=0`). Decoding and rewards do not count.
- `offline`: rows of a dataset are read and made into a batch, with a reference (`beta=0.04`) whose log-probabilities are
  the recorded ones. Everything counts.
- `offline_reference`: the same with a reference that did not make the data, which costs a forward pass of its own.

Every round takes each step once, in changing order. Forward passes with and without a gradient are counted.
"""

from __future__ import annotations

import copy
import json
import math
import random
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from training_cost import make_batch, make_model, make_parser, spec_of
from transformers import AutoTokenizer

from trl_diffusion import DTRPOConfig, DTRPOTrainer, tiny_policy_path
from trl_diffusion.trajectories.dataset import Provenance, to_rows
from trl_diffusion.trajectories.fingerprint import fingerprint_policy, fingerprint_tokenizer


KINDS = ("online", "offline", "offline_reference")


def make_rows(args, model, tokenizer) -> Dataset:
    """Stored responses, of random characters in a random order, one token a step."""
    spec, rng = spec_of(args), random.Random(0)
    rows = []
    for number in range(4):
        batch = make_batch(args, args.prompt_length, True).to("cpu")
        prompt = "".join(rng.choices("0123456789", k=args.prompt_length))
        batch.prompt_ids[:] = torch.tensor(tokenizer(prompt)["input_ids"])
        batch.canvas_ids = batch.canvas_ids % (len(tokenizer) - 8) + 8  # characters, no special tokens
        batch.logps[:] = -math.log(args.vocab_size)
        provenance = Provenance(
            fingerprint_policy(model), fingerprint_tokenizer(tokenizer), spec, {"order": "random", "temperature": 1.0}
        )
        (row,) = to_rows(batch, spec, args.batch_size, provenance)
        rows.append(
            {"prompt": prompt, "row": number, **row, "reward_codes": [rng.random() for _ in row["canvas_lengths"]]}
        )
    return Dataset.from_list(rows)


def make_trainer(args, kind: str, path: str, dataset: Dataset, tokenizer, directory: str) -> DTRPOTrainer:
    config = DTRPOConfig(
        directory,
        per_device_train_batch_size=args.batch_size,
        num_generations=args.batch_size,
        max_completion_length=args.response_length,
        share_prompts=False,
        beta=0.0 if kind == "online" else 0.04,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=args.device == "cpu",
        model_init_kwargs={"dtype": args.dtype},
    )
    trainer = DTRPOTrainer(path, args=config, train_dataset=dataset, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def count_forwards(trainer: DTRPOTrainer) -> dict[str, int]:
    counts = {"grad": 0, "no_grad": 0}

    def hook(module, args):
        counts["grad" if torch.is_grad_enabled() else "no_grad"] += 1

    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            model.register_forward_pre_hook(hook)
    return counts


def step(trainer: DTRPOTrainer, optimizer, rows: list[dict], prepared: bool) -> tuple[float, float]:
    """Seconds, and seconds of processor time, of one optimizer step."""
    inputs = trainer._generate_and_score_completions(rows) if prepared else None
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter(), time.process_time()
    if inputs is None:
        inputs = trainer._generate_and_score_completions(rows)
    trainer.accelerator.backward(trainer.compute_loss(trainer.model, inputs))
    optimizer.step()
    optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun[0], time.process_time() - begun[1]


def main() -> None:
    args = make_parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left", trust_remote_code=False)
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(args)
        model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(f"{directory}/model")
        dataset = make_rows(args, model, tokenizer)
        rows = [row for row in dataset for _ in range(args.batch_size)]
        by_another = dataset.map(lambda row: {"policy_fingerprint": "0" * 32})
        trainers = {
            kind: make_trainer(
                args, kind, f"{directory}/model", by_another if kind == "offline_reference" else dataset, tokenizer,
                directory,
            )
            for kind in KINDS
        }  # fmt: skip
        del model
        counts = {kind: count_forwards(trainer) for kind, trainer in trainers.items()}
        optimizers = {kind: torch.optim.AdamW(t.model.parameters(), lr=1e-6) for kind, t in trainers.items()}
        wall, cpu = {kind: [] for kind in KINDS}, {kind: [] for kind in KINDS}
        for round_number in range(args.rounds + 1):  # the first round warms up
            order = list(KINDS)
            random.Random(round_number).shuffle(order)
            begin = round_number % 4 * args.batch_size
            for kind in order:
                batch = copy.deepcopy(rows[begin : begin + args.batch_size])
                elapsed = step(trainers[kind], optimizers[kind], batch, prepared=kind == "online")
                if round_number:
                    wall[kind].append(elapsed[0])
                    cpu[kind].append(elapsed[1])

    steps = args.rounds + 1
    print(f"{'step':<20}{'seconds':>10}{'range':>18}{'processor':>12}{'forwards':>10}{'without gradient':>18}")
    for kind in KINDS:
        spread = f"{min(wall[kind]):.2f} - {max(wall[kind]):.2f}"
        print(
            f"{kind:<20}{statistics.median(wall[kind]):>10.3f}{spread:>18}{statistics.median(cpu[kind]):>12.3f}"
            f"{counts[kind]['grad'] / steps:>10.1f}{counts[kind]['no_grad'] / steps:>18.1f}"
        )

    def ratio(seconds: dict[str, list[float]], kind: str) -> float:
        return round(statistics.median(seconds[kind]) / statistics.median(seconds["online"]), 4)

    results = {
        "offline_vs_online": ratio(wall, "offline"),
        "offline_vs_online_processor_time": ratio(cpu, "offline"),
        "offline_reference_vs_online": ratio(wall, "offline_reference"),
        "no_grad_forwards_offline": counts["offline"]["no_grad"],
        "no_grad_forwards_offline_reference": counts["offline_reference"]["no_grad"],
    }
    for name, value in results.items():
        print(f"{name}: {value}")
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
