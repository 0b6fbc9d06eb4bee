"""A policy with NaN or infinity in it gives no answer: every way of asking it is an error that says where, and leaves no file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from datasets import config as datasets_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import MASK, SPECS, make_policy, make_prompts
from tests.offline.conftest import length, prompt_dataset
from tests.trainer.conftest import codes
from trl_diffusion import DecodingConfig, DTRPOConfig, DTRPOTrainer, collect, decode, generate, tiny_policy_path
from trl_diffusion.commands import collect as collect_command
from trl_diffusion.commands import evaluate as evaluate_command
from trl_diffusion.commands.generate import main as generate_command
from trl_diffusion.decoding import loop
from trl_diffusion.evaluation.generate import generate as answer
from trl_diffusion.evaluation.likelihood import chain_likelihoods, elbo_likelihoods
from trl_diffusion.offline.preferences import from_preferences
from trl_diffusion.policies.forward import NonFiniteLogits
from trl_diffusion.policies.policy import Policy, open_policy


PAIRS = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": str(n + 2)} for n in range(3)]


def broken(model, value: float = torch.nan):
    """The model with a weight of this value."""
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[0, 0] = value
    return model


@pytest.fixture(scope="module")
def broken_path(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("broken")
    broken(AutoModelForCausalLM.from_pretrained(tiny_policy_path())).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_policy_path()).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left")


# -------------------------------------------------------------------------------------------------------- the decoder


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_weight_that_is_not_finite(spec, value, temperature):
    policy = broken(make_policy(spec), value)
    config = DecodingConfig(16, temperature, strategy="entropy", tokens_per_step=2)
    with pytest.raises(
        FloatingPointError, match="Prompt 0: the policy's logits hold NaN, at step 0 of block 0 of its"
    ):
        decode(policy, make_prompts(), config, spec, seeds=[0] * 6)


@pytest.fixture
def spoil(monkeypatch):
    """Changes the logits at one position of the sequence, which one prompt alone reaches."""

    def install(position: int, change) -> None:
        original = loop.policy_logits

        def policy_logits(model, input_ids, position_ids, allowed, rows, columns, cache=None):
            logits = original(model, input_ids, position_ids, allowed, rows, columns, cache=cache)
            here = position_ids[rows, columns] == position
            return torch.where(here[:, None], change(logits.clone()), logits)

        monkeypatch.setattr(loop, "policy_logits", policy_logits)

    return install


SPEC = SPECS["block-from-response"].replace(stop_token_ids=())  # blocks of 8
PROMPTS = make_prompts((3, 8, 21, 5))  # the third alone reaches position 21 + 16 - 1


def put(token, value):
    def change(logits):
        logits[:, token] = value
        return logits

    return change


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (put(7, torch.nan), "hold NaN"),
        (put(7, torch.inf), "hold infinity"),
        (put(MASK, torch.nan), "hold NaN"),
        (put(slice(None), -torch.inf), "give every token that may be proposed probability 0"),
    ],
)
@pytest.mark.parametrize("options", [{"strategy": "threshold"}, {"temperature": 0.7, "top_k": 5}])
def test_which_prompt_and_which_step(spoil, change, error, options):
    """Found among the candidates of a step, whether they are unmasked or not: block 1 is reached, then it is an error."""
    spoil(21 + 15, change)
    expected = f"Prompt 2: the policy's logits {error}, at step 0 of block 1 of its response"
    config = DecodingConfig(16, tokens_per_step=4, **options)
    for batch_size in (None, 1):
        with pytest.raises(NonFiniteLogits, match=expected) as caught:
            decode(make_policy(SPEC), PROMPTS, config, SPEC, [0] * 4, batch_size)
        assert caught.value.row == 2
    three = [prompt for prompt in PROMPTS if len(prompt) != 21]
    decode(make_policy(SPEC), three, config, SPEC, [0] * 3)


def test_tokens_that_the_policy_rules_out_are_no_error(spoil):
    """Minus infinity is the logarithm of a probability, as long as something is left."""
    spoil(21 + 15, put(slice(8, None), -torch.inf))
    batch = decode(make_policy(SPEC), PROMPTS, DecodingConfig(16, 1.0), SPEC, [0] * 4)
    assert batch.canvas_ids[2, 15] < 8 and batch.logps.isfinite().all()


def test_settings_that_leave_nothing():
    policy = make_policy(SPEC)
    with pytest.raises(FloatingPointError, match="give every token that may be proposed probability 0"):
        decode(policy, PROMPTS, DecodingConfig(8, suppress_tokens=tuple(range(MASK))), SPEC)
    with pytest.raises(FloatingPointError, match="overflow when they are divided by the temperature, 1e-38"):
        decode(policy, PROMPTS, DecodingConfig(8, 1e-38), SPEC, [0] * 4)


def test_the_device_is_waited_for_once_a_step(monkeypatch):
    transfers, steps = [], []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda *args, **kwargs: transfers.append(1) or original(*args, **kwargs))
    for name in ("item", "tolist", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *args: pytest.fail("another wait for the device"))
    policy = make_policy(SPEC)
    running = loop.DenoisingLoop(policy, PROMPTS, DecodingConfig(16), SPEC, None, on_step=lambda _: steps.append(1))
    running._admit()
    while any(running.lanes):
        running._step()
    assert len(transfers) == len(steps) > 10


# ------------------------------------------------------------------------------------------- whoever asks the decoder


def test_generate(broken_path, tokenizer, capsys):
    model = AutoModelForCausalLM.from_pretrained(broken_path).train()
    with pytest.raises(FloatingPointError, match="Prompt 0: the policy's logits hold NaN"):
        generate(model, tokenizer, ["sudoku 3102200002100320"], max_new_tokens=17)
    assert model.training  # as it was
    assert generate_command(["sudoku 3102200002100320", "--model", str(broken_path), "--max_new_tokens", "17"]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: Prompt 0: the policy's logits hold NaN")]
    assert not out and len(lines) == 1 and "Traceback" not in err


def test_a_collection_holds_whole_shards_only(tokenizer, tmp_path):
    """The policy breaks while the second shard is scored: the third is not written, and what is there stays."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_path())
    calls = []

    def breaks(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 2:
            broken(model)
        return codes(completions)

    directory = tmp_path / "run"
    options = {"num_responses": 4, "rows_per_shard": 3, "batch_size": 8, "seed": 5, "disable_tqdm": True}
    with pytest.raises(FloatingPointError, match="Prompt 6: the policy's logits hold NaN, at step 0 of block 0"):
        decoding = DecodingConfig(14, 1.0, tokens_per_step=2)
        collect(model, tokenizer, prompt_dataset(9), [breaks, length], directory, decoding, **options)
    files = sorted(path.name for path in directory.rglob("*") if path.is_file())
    assert files == ["collection.json", "shard-00000.parquet", "shard-00001.parquet"]
    shards = [str(path) for path in directory.rglob("*.parquet")]
    stored = load_dataset("parquet", data_files=shards, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(stored) == 6
    assert all(value == value for row in stored["event_logps"] for response in row for value in response)


def test_collect_ends_with_a_line(broken_path, tmp_path, monkeypatch, capsys):
    words = ["--model_name_or_path", str(broken_path), "--output_dir", str(tmp_path / "run"), "--train_size", "4"]
    monkeypatch.setattr(sys, "argv", ["collect", *words])
    with pytest.raises(SystemExit) as end:
        collect_command.main()
    assert end.value.code == 2
    assert "error: Prompt 0: the policy's logits hold NaN" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.parquet")) and not (tmp_path / "run" / "README.md").exists()


def test_evaluation(broken_path, tmp_path, monkeypatch, capsys):
    """One line, and no figure."""
    (tmp_path / "data" / "sudoku").mkdir(parents=True)
    rows = "Puzzle,Solution\n3102200002100320,3142243142131324\n"
    (tmp_path / "data" / "sudoku" / "4x4_test.csv").write_text(rows)
    words = ["--model_name_or_path", str(broken_path), "--tasks", "sudoku", "--data_dir", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", ["evaluate", *words, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        evaluate_command.main()
    assert end.value.code == 2
    assert "error: Prompt 0: the policy's logits hold NaN" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_evaluation_names_the_prompt_by_its_own_number(spoil):
    """Prompts are answered in another order than they were given in."""
    spoil(21 + 15, put(7, torch.nan))
    policy = Policy(make_policy(SPEC), None, SPEC)
    with pytest.raises(FloatingPointError, match="Prompt 2: "):
        answer(policy, PROMPTS, DecodingConfig(16), batch_size=1)


# ----------------------------------------------------------------------------------------------------------- scoring


def test_likelihoods(broken_path):
    policy = open_policy(str(broken_path))
    for likelihoods in (chain_likelihoods, elbo_likelihoods):
        with pytest.raises(FloatingPointError, match="Continuation 1: the policy's log-likelihood of it is nan"):
            likelihoods(policy, [[7], [8]], [[], [9, 10]])


def test_texts_that_have_no_likelihood():
    """The mask token, which the state would show as a gap, and tokens that do not exist."""
    spec = SPECS["block-from-sequence"].replace(absent_token_ids=((30, MASK),))
    policy = Policy(make_policy(spec), None, spec)
    for likelihoods in (chain_likelihoods, elbo_likelihoods):
        with pytest.raises(ValueError, match=r"Continuation 1, position 1, holds the mask token \(39\)"):
            likelihoods(policy, [[7], [8]], [[9], [9, MASK]])
        with pytest.raises(
            ValueError, match="Continuation 0, position 0, holds token 30, which the tokenizer does not"
        ):
            likelihoods(policy, [[7], [8]], [[30], [9]])
        with pytest.raises(
            ValueError, match="Prompt 1, position 0, holds token 40, but the model's vocabulary has 40"
        ):
            likelihoods(policy, [[7], [40]], [[9], [9]])


def test_a_replay_is_not_kept(broken_path, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path)
    policy = open_policy(str(broken_path))
    with pytest.raises(
        FloatingPointError, match="Row 0, column `chosen`: the policy's log-probabilities of the response"
    ):
        from_preferences(Dataset.from_list(PAIRS), tokenizer, policy.spec, "confidence", model=policy.model)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_training(broken_path, tmp_path):
    """The rollout already fails, before a step is made; so does an answer."""
    args = DTRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=14,
        max_steps=1,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DTRPOTrainer(str(broken_path), codes, args, prompt_dataset(4))
    with pytest.raises(FloatingPointError, match="Prompt 0: the policy's logits hold NaN"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(FloatingPointError, match="Prompt 0: the policy's logits hold NaN"):
        trainer.answer(["sudoku 3102200002100320"])
