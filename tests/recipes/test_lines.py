"""What a run prints, from its first to its last line."""

from __future__ import annotations

import dataclasses
import shlex
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import ModelConfig

from tests.trainer.conftest import char_spec, make_trainer, tokenizer  # noqa: F401
from trl_diffusion import DTRPOConfig, tiny_policy_path
from trl_diffusion.commands import collect, evaluate, generate, iterate, lines, train
from trl_diffusion.commands.lines import RunLines, describe_output, describe_policy, describe_updates, next_command
from trl_diffusion.utils import read_mapping


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (8_030_000_000, "8.03 billion"),
        (668_160, "0.67 million"),
        (2_500_000, "2.50 million"),
        (49_999, "49,999"),
        (0, "0"),
    ],
)
def test_large_numbers(number, words):
    assert lines.in_words(number) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.2 seconds"), (4.26, "4.3 seconds"), (45, "45 seconds"), (89, "89 seconds"), (90, "1.5 minutes"),
     (240, "4.0 minutes"), (1500, "25 minutes"), (5400, "1.5 hours"), (360_000, "100 hours")],
)  # fmt: skip
def test_durations(seconds, words):
    assert lines.duration(seconds) == words


def test_texts_are_one_line():
    assert lines.one_line("a\n  b\x1b[2J") == r"a b\x1b[2J"
    assert lines.one_line("x" * 101) == f"{'x' * 96} ..." and lines.one_line("x" * 100) == "x" * 100
    assert lines.prompt_text([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]) == "u"


def test_a_run_is_described(make_trainer, tmp_path):  # noqa: F811
    """The policy, its size, how many updates of how many responses, where it writes."""
    trainer = make_trainer(max_steps=6, gradient_accumulation_steps=2, save_steps=5)
    size = sum(weight.numel() for weight in trainer.model.parameters())
    line = describe_policy(trainer, "path/to/it")
    assert (
        line == f"Policy: path/to/it, {size:,} weights; block attention, blocks of {trainer.spec.block_size} tokens."
    )
    assert describe_policy(trainer, tiny_policy_path()).startswith("Policy: the embedded policy, ")
    trainer.state.max_steps, trainer.state.global_step = 6, 0
    batch, group = trainer.args.per_device_train_batch_size, trainer.num_generations
    expected = f"Training: 6 updates, each on {2 * batch} responses to {2 * batch // group} prompts."
    assert describe_updates(trainer, stored=False) == expected
    trainer.state.global_step = 2
    stored = expected.replace("responses", "stored responses").replace("prompts.", "prompts; 2 are done.")
    assert describe_updates(trainer, stored=True) == stored
    where = f"Output: {tmp_path}, with the trained policy at the end"
    trainer.args.output_dir = str(tmp_path)
    for strategy, rest in (
        ("steps", ", and a checkpoint every 5 updates."),
        ("epoch", ", and checkpoints on the way."),
        ("no", " (`save_strategy` is no: nothing is kept of an interrupted run)."),
    ):
        trainer.args.save_strategy = strategy
        assert describe_output(trainer.args) == where + rest


def test_weights_of_an_adapter_and_of_shared_weights():
    shared = torch.nn.Linear(3, 2)
    for weight in shared.parameters():
        weight.ds_numel = 100
    shared.bias.requires_grad_(False)
    assert lines.count_weights(shared) == 200 and lines.count_weights(shared, trained=True) == 100


@pytest.mark.parametrize(("steps_per_generation", "num_iterations", "said_at"), [(1, 1, 2), (2, 2, 5)])
def test_how_long_it_takes_is_said_after_whole_rollouts(
    steps_per_generation, num_iterations, said_at, monkeypatch, capsys
):
    """The first update warms up; then one update of each kind is measured. Nothing is said when nothing is left."""
    clock = iter(range(0, 1000, 30))
    monkeypatch.setattr(lines.time, "perf_counter", lambda: next(clock))
    args = SimpleNamespace(
        steps_per_generation=steps_per_generation, gradient_accumulation_steps=1, resume_from_checkpoint=None
    )
    for last in (10, said_at):
        run = RunLines()
        run.follow(
            SimpleNamespace(num_iterations=num_iterations, add_callback=lambda one: None, args=args), stored=False
        )
        said = []
        for step in range(1, last + 1):
            if run._begun is not None:  # as many seconds in each update
                monkeypatch.setattr(lines.time, "perf_counter", lambda step=step: 30.0 * step)
            else:
                monkeypatch.setattr(lines.time, "perf_counter", lambda: 30.0)
            run.on_step_end(args, SimpleNamespace(global_step=step, max_steps=last, is_world_process_zero=True), None)
            said += [step] * bool(out := capsys.readouterr().out)
            if out:
                left = last - said_at
                expected = (
                    f"An update takes about 30 seconds, the {left} that are left about {lines.duration(30 * left)}."
                )
                assert out.strip() == expected
        assert said == ([said_at] if last > said_at else [])


def test_the_next_command(make_trainer):  # noqa: F811
    """It has the settings of the training that are not the defaults, and `generate` takes it."""
    trainer = make_trainer(strategy="threshold", threshold=0.5, tempered_confidence=True)
    words = shlex.split(next_command(trainer, "1+1="))
    options = generate._parser().parse_args(words[2:])
    assert words[:2] == ["trl-diffusion", "generate"] and options.prompt == "1+1=" and not options.chat
    assert (
        options.model == str(trainer.args.output_dir) and options.max_new_tokens == trainer.args.max_completion_length
    )
    assert (options.strategy, options.threshold, options.tempered_confidence) == ("threshold", 0.5, True)
    assert options.temperature is None and options.schedule is None
    talk = [{"role": "user", "content": "first line\nsecond line"}]
    trainer.chat_template_kwargs = {"enable_thinking": False}
    adapted = get_peft_model(trainer.model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer.model, trainer.args.diffusion_spec = adapted, {"block_size": 8}
    options = generate._parser().parse_args(shlex.split(next_command(trainer, talk))[2:])
    assert options.prompt == "YOUR PROMPT" and options.chat and options.model is None
    assert options.adapter == options.tokenizer == str(trainer.args.output_dir)
    assert read_mapping(options.diffusion_spec, "diffusion_spec") == {"block_size": 8}
    assert read_mapping(options.chat_template_kwargs, "chat_template_kwargs") == {"enable_thinking": False}
    size = sum(weight.numel() for weight in adapted.parameters())
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert f"{size:,} weights, of which the adapter's {trained:,} are trained;" in describe_policy(trainer, "x")


@pytest.mark.parametrize(
    ("was", "now", "row"), [([0, 1, 0], [0, 1, 1], 2), ([1, 1], [0, 1], 1), ([0, 0], [0, 0], 0), ([1, 0], [1, 1], 1)]
)
def test_the_answer_that_tells_most(was, now, row):
    assert train.most_telling(was, now) == row


def test_what_comes_after_collecting():
    """Each option of the next commands exists, and has the value that collecting had."""
    args = collect.CollectArguments(
        output_dir="my data", task="gsm8k", train_file="rows.jsonl", strategy="entropy", seed=3
    )
    view, following = (
        shlex.split(line) for line in collect.next_commands(args, ModelConfig(model_name_or_path="MODEL"))
    )
    assert view == ["trl-diffusion", "view", "my data", "0", "--output", "response.html"]
    script, training, model = train.parse([*following[2:], "--bf16", "false", "--output_dir", "out"])
    assert (script.task, script.train_file, script.trajectories) == ("gsm8k", "rows.jsonl", ["my data"])
    assert (training.strategy, training.max_completion_length, training.tokens_per_step) == ("entropy", 17, 2)
    assert training.loss_type == "dpo" and training.beta > 0 and model.model_name_or_path == "MODEL"
    known = {field.name for kind in (train.ScriptArguments, DTRPOConfig) for field in dataclasses.fields(kind)}
    assert {field.name for field in dataclasses.fields(args)} - known == {*collect._OWN} - {
        "output_dir",
        "train_size",
        "seed",
    }

    _, following = collect.next_commands(collect.CollectArguments(), ModelConfig())
    assert following == "trl-diffusion train --trajectories outputs/trajectories --config tiny_offline"
    adapted = collect.CollectArguments(adapter_name_or_path="ADAPTER")
    assert len(collect.next_commands(adapted, ModelConfig(model_name_or_path="MODEL"))) == 1


def test_what_comes_after_an_evaluation():
    args = evaluate.EvaluateArguments(
        tasks=["sudoku", "gsm8k"], data_dir="my data", seeds=[1, 2], model_name_or_path="MODEL", output_dir="out/"
    )
    words = shlex.split(evaluate.next_command(args))
    again = evaluate.parse(words[2:])
    assert (
        words[:2] == ["trl-diffusion", "evaluate"]
        and again.model_name_or_path == "OTHER"
        and again.output_dir == "out_other"
    )
    assert (again.tasks, again.data_dir, again.seeds) == (["sudoku", "gsm8k"], "my data", [1, 2])


@pytest.mark.parametrize(
    "words", [[], ["--rounds", "2"], ["--rounds=2", "--seed", "1"], ["--seed", "1", "--rounds", "2"]]
)
def test_what_comes_after_rounds(words):
    again = shlex.split(iterate._more_rounds(words, 6))
    options = iterate._parser().parse_args(again[2:])
    assert options.rounds == 6 and again.count("--rounds") == 1 and options.seed == (1 if "--seed" in words else None)
