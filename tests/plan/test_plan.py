"""The plan against what can be counted by hand, and against tensors that really are there."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig

from tests.conftest import make_policy
from trl_diffusion import DecodingConfig, DiffusionSpec, decode
from trl_diffusion.commands import recipes_path
from trl_diffusion.commands.plan import GIB, advice, main, what_it_trains
from trl_diffusion.plan.cost import Machine, RolloutCost, rollout_cost
from trl_diffusion.plan.simulate import Footprint, LiveBytes, Workload, _batch, simulate
from trl_diffusion.plan.strategies import Plan, make_plans
from trl_diffusion.policies.trial import try_policy
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score
from trl_diffusion.utils import write_text


SPEC = DiffusionSpec(mask_token_id=39, block_size=8)
WORK = Workload(
    batch_size=8, num_generations=4, prompt_length=24, completion_length=32, rollout_batch_size=8, checkpointing=False
)


def test_live_bytes_follow_tensors():
    with LiveBytes() as live:
        first = torch.zeros(1000)
        view = first[:10]
        second = first + 1
        assert live.now == 8000
        del first, second
        assert live.now == 4000 and live.peak == 8000  # a view keeps all of its storage
        del view
        assert live.now == 0


def count_flops() -> FlopCounterMode:
    """PyTorch's counter, with the attention kernels of a CPU, which it does not know."""
    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)


def long(*values) -> object:
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("attention", "draws", "checkpointing"),
    [("block", 3, False), ("full", 1, False), ("block", 1, True), long("block", 1, False), long("full", 3, False)],
)
def test_simulated_update_is_the_real_one(attention, draws, checkpointing):
    """The same pass with real tensors, counted the same way: nothing is lost because tensors had no content."""
    spec = SPEC.replace(attention=attention, block_origin="response" if attention == "full" else "sequence")
    work = Workload(
        **{
            **vars(WORK),
            "estimator": EstimatorConfig(num_draws=draws),
            "share_prompts": False,
            "checkpointing": checkpointing,
        }
    )
    model = make_policy(spec).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = simulate(model.config, spec, work)
    batch = _batch(spec, work)
    with LiveBytes() as live:
        states = ESTIMATORS["dtrpo"].states(batch, spec, list(range(8)), work.estimator)
        layout = pack(batch, spec, states)
        live.peak = start = live.now
        logps, _ = score(model, layout, spec, compute_entropy=True)
        (logps * layout.weights).sum().backward()
    total = found.gradients + found.activations
    assert total == pytest.approx(live.peak - start, rel=0.1)
    assert found.packed_tokens == layout.input_ids.numel() and found.scored_tokens == len(layout.targets)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.weights == 4 * found.parameters == found.gradients and found.optimizer == 2 * found.weights


@pytest.mark.parametrize(
    ("attention", "prompt_length"), [("block", 27), ("full", 24), long("block", 24), long("full", 27)]
)
def test_operations_are_those_of_the_real_passes(attention, prompt_length):
    """PyTorch counts the operations of a real rollout and of a real update; the plan has neither."""
    spec = SPEC.replace(attention=attention, block_origin="response" if attention == "full" else "sequence")
    work = Workload(**{**vars(WORK), "prompt_length": prompt_length, "tokens_per_step": 3})
    model = make_policy(spec).train()
    found = simulate(model.config, spec, work)
    rollout = rollout_cost(model.config, spec, work, found)
    try_policy(model, spec)  # its passes are not those of a rollout
    with count_flops() as counter:
        config = DecodingConfig(max_new_tokens=32, tokens_per_step=3, stop_rule="block")  # a plan counts whole blocks
        decode(model, [[1] * prompt_length] * 4 + [[2] * prompt_length] * 4, config, spec)
    assert rollout.flops == counter.get_total_flops()
    batch = _batch(spec, work)
    states = ESTIMATORS["dtrpo"].states(batch, spec, list(range(8)), work.estimator)
    with count_flops() as counter:
        logps, _ = score(
            model, pack(batch, spec, states, share_prompts=attention == "block"), spec, compute_entropy=True
        )
        assert found.score_flops == counter.get_total_flops()
        logps.sum().backward()
    assert found.update_flops == counter.get_total_flops() > 3 * found.score_flops


@pytest.mark.parametrize(
    ("fields", "prompt_length"), [({"token_shift": True}, 27), ({"clean_attention": "causal"}, 24)]
)
def test_an_autoregressive_first_token_is_a_step_of_its_own(fields, prompt_length):
    """PyTorch counts the operations of a real rollout. A block of 8 takes 1 + 3 passes, and one that begins with the prompt 2."""
    spec = SPEC.replace(first_token="autoregressive", **fields)
    work = Workload(**{**vars(WORK), "prompt_length": prompt_length, "tokens_per_step": 3, "rollout_batch_size": 2})
    model = make_policy(spec, num_hidden_layers=1)
    linear = sum(one.weight.numel() for one in model.modules() if isinstance(one, torch.nn.Linear))
    linear -= model.get_output_embeddings().weight.numel()
    footprint = SimpleNamespace(linear=linear, used_experts=0, weights=0)
    found = rollout_cost(model.config, spec, work, footprint)
    assert found.passes == 4 * 4 + 2 * (prompt_length == 27)
    try_policy(model, spec)
    with count_flops() as counter:
        config = DecodingConfig(max_new_tokens=32, tokens_per_step=3, stop_rule="block")
        made = decode(model, [[1] * prompt_length] * 2, config, spec)
    assert found.flops == counter.get_total_flops()
    assert _batch(spec, work).steps[0].sort().values.tolist() == made.steps[0].sort().values.tolist()


def test_time_is_that_of_the_slower_of_computing_and_reading():
    cost = RolloutCost(passes=10, flops=4000, weights=30)
    assert cost.seconds(Machine(flops=100, bandwidth=1e9)) == 40
    assert cost.seconds(Machine(flops=1e9, bandwidth=100)) == 3


@pytest.mark.slow
def test_what_grows_with_what():
    """Memory grows with scored tokens, not with vocabulary times length; checkpointing and LoRA save what they should."""
    config = make_policy(SPEC, vocab_size=4000, num_hidden_layers=1).config
    short = simulate(config, SPEC, WORK)
    long = simulate(config, SPEC, Workload(**{**vars(WORK), "prompt_length": 96}))
    assert long.logits == short.logits == short.scored_tokens * 4000 * 4
    assert long.packed_tokens == short.packed_tokens + 2 * 72  # two groups, and each prompt is there once
    draws = simulate(config, SPEC, Workload(**{**vars(WORK), "estimator": EstimatorConfig(num_draws=4)}))
    assert draws.scored_tokens == 4 * short.scored_tokens and draws.activations > short.activations + short.logits
    saving = simulate(config, SPEC, Workload(**{**vars(WORK), "checkpointing": True}))
    assert saving.activations < 0.8 * short.activations
    adapter = simulate(config, SPEC, WORK, lora_rank=4)
    assert adapter.trainable < 0.2 * adapter.parameters and adapter.gradients == 4 * adapter.trainable
    half = simulate(config, SPEC, WORK, torch.bfloat16)
    assert half.weights * 2 == short.weights


def test_strategies_share_what_they_say():
    """Eight GPUs, 1,000 million weights, figures of the engines' documentation."""
    config = make_policy(SPEC, num_hidden_layers=1).config
    mixed, half = simulate(config, SPEC, WORK, autocast=True), simulate(config, SPEC, WORK, torch.bfloat16)
    adapter = simulate(config, SPEC, WORK, torch.bfloat16, lora_rank=4)
    plans = {plan.name: plan for plan in make_plans(mixed, half, adapter, 8, beta=0.1)}
    n = mixed.parameters
    ddp, zero2, zero3 = plans["DDP, full"], plans["ZeRO-2, full"], plans["ZeRO-3, full"]
    assert ddp.weights + ddp.gradients + ddp.optimizer == 16 * n and ddp.reference == 4 * n
    assert (zero2.weights, zero2.gradients, zero2.optimizer) == (2 * n, 2 * n / 8, 12 * n / 8)
    assert zero3.weights + zero3.gradients + zero3.optimizer == 16 * n / 8 and zero3.reference == 2 * n / 8
    assert plans["ZeRO-3 offload, full"].weights == 0 < plans["ZeRO-3 offload, full"].host
    assert plans["DDP, LoRA"].reference == 0
    assert plans["DDP, QLoRA"].weights < plans["DDP, LoRA"].weights
    sharded = {plan.name: plan for plan in make_plans(mixed, half, adapter, 8, beta=0.1, gather=False)}
    assert sharded["ZeRO-3, full"].rollout <= zero3.rollout
    for plan in plans.values():
        assert plan.peak >= plan.weights and plan.fits(2**40) and not plan.fits(2**30)


def test_what_train_refuses_is_refused(capsys, tmp_path, monkeypatch):
    """A causal model, layers that a mask does not rule, too long a canvas, groups that do not fill a rollout, other recipes."""
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    for name, config in {
        "causal": AutoConfig.for_model("llama", **sizes),
        "family": AutoConfig.for_model("Fast_dLLM_Qwen", **sizes),  # whose mask token its tokenizer knows
        "recurrent": AutoConfig.for_model("qwen3_next", **sizes),
    }.items():
        config.save_pretrained(name)
    spec = ["--diffusion_spec", "mask_token_id:39+block_size:8"]
    small = ["--batch_size", "2", "--num_generations", "2", "--rollout_batch_size", "2", "--prompt_length", "16",
             "--completion_length", "16", "--lora_rank", "4"]  # fmt: skip
    write_text("recipe.yaml", "max_steps: 1\nlearning_rates: 1\n")
    write_text("numbers.yaml", "max_steps: 1\nlearning_rate: .nan\n")
    for words, message in (
        (["causal"], "This `llama` model has no diffusion spec.*--diffusion_spec mask_token_id:ID\\+block_size:N"),
        (
            ["causal", "--diffusion_spec", "block_size:8"],
            "does not say which token stands for .MASK.*--diffusion_spec mask_token_id:ID",
        ),
        (["recurrent", *spec], "`qwen3_next` cannot be a diffusion policy: it has layers of type 'linear_attention'"),
        (
            ["causal", *spec, "--prompt_length", "50"],
            r"A prompt of 50 tokens with 16 new ones, in whole blocks of 8, makes 72 positions.*64 \(`max_position",
        ),
        (
            ["causal", *spec, "--num_generations", "3", "--gpus", "1"],
            r"16 responses .* does not divide into groups of 3 \(`--num_generations`\)",
        ),
        (
            ["causal", *spec, "--num_generations", "1"],
            "`--num_generations` must be a whole number of at least 2, got 1",
        ),
        (
            ["causal", *spec, "--config", "recipe.yaml"],
            r"recipe.yaml: unknown options \['learning_rates'\].*meant to be learning_rate\?",
        ),
        (
            ["causal", *spec, "--config", "numbers.yaml"],
            "`learning_rate` must be a number of at least 0 and finite, got nan",
        ),
    ):
        assert main([words[0], *small, *words[1:]]) == 2, words
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and re.search(message, line), line
    for words in (["causal", *spec], ["family"], ["embedded:block"]):
        assert main([words[0], "--memory", "80", *small, *words[1:]]) == 0
        assert "The first that fits: DDP, full" in capsys.readouterr().out


def test_what_is_advised():
    """The first plan that fits, of what a recipe trains, with as many processes as there are GPUs."""
    plans = [
        Plan("one GPU, full", "ddp", 90 * GIB, 0, 0, 0),
        Plan("ZeRO-3 offload, full", "zero3_offload", 1 * GIB, 0, 0, 0),
        Plan("one GPU, LoRA", "ddp", 16 * GIB, 0, 0, 0),
        Plan("one GPU, QLoRA", "ddp", 6 * GIB, 0, 0, 0),
    ]
    for trains, memory, gpus, text in (
        (
            None,
            24,
            1,
            "ZeRO-3 offload, full. `trl-diffusion train --model_name_or_path org/model --accelerate_config zero3_offload --num_processes 1` ",
        ),
        (
            "LoRA",
            24,
            1,
            "fits and trains as the recipe does: one GPU, LoRA. `trl-diffusion train --config my.yaml` trains with it.",
        ),
        ("QLoRA", 12, 1, "one GPU, QLoRA. `trl-diffusion train --config my.yaml` trains with it."),
        (
            "LoRA",
            24,
            4,
            "one GPU, LoRA. `trl-diffusion train --config my.yaml --accelerate_config ddp --num_processes 4` trains",
        ),
        ("full", 100, 8, "one GPU, full. `trl-diffusion train --config my.yaml --accelerate_config ddp` trains"),
        (
            "LoRA",
            12,
            1,
            "Nothing fits of what the recipe trains (LoRA). These fit: ZeRO-3 offload, full; one GPU, QLoRA.",
        ),
        ("LoRA", 1, 1, "Nothing fits. Lower --batch_size"),
    ):
        assert text in advice(plans, memory * GIB, gpus, "org/model", trains and "my.yaml", trains)
    text = "`trl-diffusion train --model_name_or_path org/model --use_peft --load_in_4bit` trains with it."
    assert text in advice(plans[2:], 12 * GIB, 1, "org/model")
    own = str(recipes_path() / "llada.yaml")  # which every checkout and every wheel knows by its name
    assert "`trl-diffusion train --config llada` trains" in advice(plans, 24 * GIB, 1, "org/model", own, "LoRA")
    for recipe, trains in (
        ({}, None),
        ({"max_steps": 3}, "full"),
        ({"use_peft": True}, "LoRA"),
        ({"use_peft": True, "load_in_4bit": True}, "QLoRA"),
    ):
        assert what_it_trains(recipe) == trains


@pytest.mark.slow
def test_command(capsys, tmp_path, monkeypatch):
    simulated = {}

    def simulate_once(*given, **options):  # what is asked for twice below
        key = repr((given[0].to_json_string(), given[1:], options))
        simulated[key] = simulated.get(key) or simulate(*given, **options)
        return simulated[key]

    monkeypatch.setattr("trl_diffusion.commands.plan.simulate_layers", simulate_once)
    small = ["--batch_size", "2", "--num_generations", "2", "--rollout_batch_size", "2", "--prompt_length", "16",
             "--completion_length", "16", "--lora_rank", "4"]  # fmt: skip
    model = str(tmp_path / "model")
    make_policy(SPEC, num_hidden_layers=1).config.save_pretrained(model)
    assert main([model, "--gpus", "2", "--memory", "24", *small]) == 0
    shown = capsys.readouterr().out
    assert "ZeRO-3, full" in shown and "The first that fits: DDP, full" in shown
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("per_device_train_batch_size: 6\nbeta: 0.1\n")
    arguments = [model, "--json", "--memory", "0.5", "--config", str(recipe), *small[2:]]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plans"][0]["reference"] > 0 and not any(plan["fits"] for plan in found["plans"])
    assert "rollout_hours" not in found["time"]
    for text, message in (
        ("a: [", "line 1: expected the node content"),
        ("distributed_type: DEEPSPEED\n", "holds no options of a recipe"),
        (
            "gradient_accumulation_steps: eight\nbeta: 0.1\n",
            "`--accumulation` must be a whole number of at least 1, got 'eight'",
        ),
        ("beta: high\n", "`--beta` must be 0 or a finite number above it, got 'high'"),
        ("beta: 0.1\ndiffusion_spec: '{\"mask_token_id\": 5000}'\n", "`mask_token_id` holds 5000"),
    ):
        recipe.write_text(text)
        assert main([model, *small, "--config", str(recipe)]) == 2
        assert message in capsys.readouterr().err, text
    for option, value in (("--memory", "nan"), ("--memory", "0"), ("--beta", "-1"), ("--epochs", "inf")):
        assert main([model, *small, option, value]) == 2
        assert f"`{option}` must be" in capsys.readouterr().err
    arguments = [model, "--json", "--gpus", "2", "--prompts", "100", "--epochs", "3", "--tflops", "0.5", *small]
    assert main(arguments) == 0
    time = json.loads(capsys.readouterr().out)["time"]
    # 300 prompts with 2 responses each, 2 at once on each of 2 GPUs
    assert time["rollout_hours"] == pytest.approx(150 * time["rollout_seconds"] / 3600)
    assert time["update_hours_lora"] == pytest.approx(150 * time["update_seconds_lora"] / 3600)
    assert len(simulated) == 6  # two workloads, three policies
    assert main([model, "--answer_length", "17", *small]) == 2
    assert "`--answer_length` is 17, but responses have 16" in capsys.readouterr().err
    assert main([model, "--tflops", "0", *small]) == 2
    assert "`--tflops` must be above 0" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing"), *small]) == 2
    assert "error:" in capsys.readouterr().err
    assert main([model, "--gpus", "0"]) == 2
    assert "`--gpus` must be a whole number of at least 1, got 0" in capsys.readouterr().err


def test_options_of_a_recipe_that_have_no_option_here(tmp_path, monkeypatch, capsys):
    """8 positions in 3 steps are 3 a step. What is said on the command line wins."""
    seen: list[Workload] = []
    ones = Footprint(**{one.name: 1 for one in fields(Footprint)})
    monkeypatch.setattr(
        "trl_diffusion.commands.plan.simulate_layers", lambda _c, _s, work, *_, **__: seen.append(work) or ones
    )
    make_policy(SPEC, num_hidden_layers=1).config.save_pretrained(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: 1\nsteps_per_block: 3\nnum_scored_blocks: 2\nnum_iterations: 4\n")
    words = [str(tmp_path), "--json", "--prompts", "3600", "--gpus", "1", "--tflops", "1e-12", "--prompt_length", "16"]
    words += ["--completion_length", "16"]
    hours = []
    for further in ([], ["--config", str(recipe)], ["--config", str(recipe), "--tokens_per_step", "2"]):
        assert main([*words, *further]) == 0
        hours.append(json.loads(capsys.readouterr().out)["time"]["update_hours_full"])
    assert [work.tokens_per_step for work in seen[::3]] == [1, 3, 2]
    assert [work.estimator.num_blocks for work in seen[::3]] == [None, 2, 2]
    assert hours == pytest.approx([2, 8, 8])  # 3600 prompts, 8 responses, 4 in a batch of one operation
