"""`trl-diffusion collect` reads every option that it has, or refuses it by name."""

from __future__ import annotations

import re
import sys
from dataclasses import fields

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import ModelConfig

from tests.evaluation.conftest import adapter  # noqa: F401
from trl_diffusion import DecodingConfig, decode, load_trajectories, tiny_policy_path
from trl_diffusion.commands import collect
from trl_diffusion.commands.collect import OPENING
from trl_diffusion.seeds import derive_seed
from trl_diffusion.trajectories.dataset import completions_of


FEW = ["--train_size", "2", "--num_responses", "2", "--tokens_per_step", "4"]


@pytest.fixture
def collected(tmp_path, monkeypatch):
    """The rows that the command writes, and its card."""
    monkeypatch.setattr(collect, "use_all_cores", lambda: None)

    def run(*words: str) -> tuple[list[dict], str]:
        directory = tmp_path / "run"
        collect.run(*collect.parse([*FEW, "--output_dir", str(directory), *words]))
        return load_trajectories(directory).to_list(), (directory / "README.md").read_text()

    return run


def answers(model, rows: list[dict], **settings) -> list[list[list[int]]]:
    """What this model says to the prompts of rows, as a collection with seed 0 would have it."""
    config = DecodingConfig(**{"max_new_tokens": 17, "temperature": 1.0, "tokens_per_step": 4, **settings})
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    found = []
    for number, row in enumerate(rows):
        prompts = [tokenizer(row["prompt"])["input_ids"]] * 2
        seeds = [derive_seed(0, number, response) for response in range(2)]
        found.append(decode(model, prompts, config, seeds=seeds).completions())
    return found


@pytest.fixture(scope="module")
def plain():
    return AutoModelForCausalLM.from_pretrained(tiny_policy_path()).eval()


def test_an_adapter(collected, adapter, plain):  # noqa: F811
    rows, card = collected("--adapter_name_or_path", adapter)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_policy_path()), adapter)
    assert [completions_of(row) for row in rows] == answers(model.merge_and_unload().eval(), rows)
    assert answers(plain, rows) != [completions_of(row) for row in rows]
    assert "with an adapter (LoraConfig)" in card


@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_weights(collected, plain, bits):
    pytest.importorskip("bitsandbytes", reason="needs the extra `quantization`")
    rows, card = collected(f"--load_in_{bits}bit", "--temperature", "0.5")
    config = BitsAndBytesConfig(load_in_8bit=True)
    if bits == 4:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_policy_path(), quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    model.train()  # weights are not packed, as they are not where they are trained
    recorded = torch.tensor(sum((row["event_logps"][0] for row in rows), []))
    with torch.no_grad():
        assert [completions_of(row) for row in rows] == answers(model, rows, temperature=0.5)
    assert recorded.isfinite().all() and "with rounded weights" in card


def test_dtype_attention_revision_and_decoding(collected, monkeypatch):
    opened = {}
    open_policy = collect.open_policy

    def spy(*args, **kwargs):
        opened["policy"] = open_policy(*args, **kwargs)
        return opened["policy"]

    monkeypatch.setattr(collect, "open_policy", spy)
    rows, _ = collected(
        "--dtype", "bfloat16", "--attn_implementation", "eager", "--diffusion_spec", '{"block_size": 4}',
        "--model_revision", "main", "--strategy", "entropy_bound", "--entropy_bound", "0.7", "--stop_rule", "token",
    )  # fmt: skip
    model = opened["policy"].model
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert opened["policy"].spec.block_size == 4
    assert all(
        '"strategy": "entropy_bound"' in row["decoding"] and '"stop_rule": "token"' in row["decoding"] for row in rows
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--use_peft"], "`--use_peft` is for training: .*`--adapter_name_or_path`"),
        (["--lora_r", "8"], "`--lora_r` is for training"),
        (["--bnb_4bit_quant_type", "fp4"], "`--bnb_4bit_quant_type` is for weights of 4 bits: add `--load_in_4bit`"),
        (["--load_in_4bit", "--dtype", "auto"], "`--load_in_4bit` computes in `--dtype`: give bfloat16"),
        (["--load_in_4bit", "--load_in_8bit"], "can't use 8 bit and 4 bit precision at the same time"),
        (["--batch_size", "0"], "`batch_size` must be a whole number of at least 1, got 0"),
        (["--max_completion_length", "0"], "`max_completion_length` must be a whole number of at least 1, got 0"),
        (["--temperature", "-1"], "`temperature` must be a number of at least 0 and finite, got -1.0"),
        (["--threshold", "2"], "`threshold` must be a number of at least 0 and at most 1, got 2.0"),
        (["--approximate_cache", "sub_block"], "needs `sub_block_size`"),
        (["--approximate_cache", "prefix"], "`--approximate_cache` is for rollouts: .* Leave it out"),
        (["--attn_implementation", "flash_attention_2"], "cannot run the attention mask of a diffusion policy"),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_loaded(tmp_path, monkeypatch, capsys, words, message):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)
    monkeypatch.setattr(sys, "argv", ["collect", "--output_dir", str(tmp_path / "run"), *words])
    with pytest.raises(SystemExit) as end:
        collect.main()
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_no_option_of_models_is_left_over():
    """Each is for opening a model, or refused when it is set; a new one of TRL's would be, too."""
    for option in fields(ModelConfig):
        args = ModelConfig()
        setattr(args, option.name, "another")
        if option.name in OPENING and "bnb" not in option.name:
            collect.check_model_options(args)
        else:
            with pytest.raises(ValueError, match=f"`--{option.name}`"):
                collect.check_model_options(args)
