"""One prompt is taken wherever several are, and arguments of another kind or in another order are answered by name."""

from __future__ import annotations

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_diffusion import (
    DecodingConfig,
    DTRPOConfig,
    DTRPOTrainer,
    collect,
    decode,
    from_preferences,
    generate,
    get_spec,
    load_trajectories,
    set_spec,
    tiny_policy_path,
)
from trl_diffusion.evaluation.run import Evaluation
from trl_diffusion.policies.policy import Policy, open_policy
from trl_diffusion.policies.prompts import as_prompts
from trl_diffusion.trainer.callbacks import MetricCallback


PROMPT, MESSAGES = "1+1=", [{"role": "user", "content": "1+1="}]
SHORT = DecodingConfig(8, tokens_per_step=8)
ONE_BY_ONE = {"num_responses": 1, "disable_tqdm": True}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_policy_path())


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


@pytest.fixture(scope="module")
def trainer(model, tokenizer, tmp_path_factory):
    args = DTRPOConfig(
        str(tmp_path_factory.mktemp("run")), bf16=False, max_completion_length=8, per_device_train_batch_size=2,
        num_generations=2, report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    return DTRPOTrainer(model, zero, args, Dataset.from_dict({"prompt": [PROMPT] * 2}), processing_class=tokenizer)


def zero(completions, **kwargs):
    return [0.0] * len(completions)


def test_one_prompt_is_taken_everywhere(model, tokenizer, trainer, tmp_path):
    """As text, as messages, as a single message, and as a list or a column of either."""
    (expected,) = generate(model, tokenizer, [PROMPT], SHORT).texts
    ids = tokenizer(PROMPT)["input_ids"]
    policy = Policy(model, tokenizer, get_spec(model.config))
    column = Dataset.from_dict({"prompt": [PROMPT]})["prompt"]
    for number, prompts in enumerate((PROMPT, MESSAGES, MESSAGES[0], [PROMPT], [MESSAGES], (PROMPT,), column)):
        assert generate(model, tokenizer, prompts, SHORT).texts == [expected]
        assert trainer.answer(prompts, SHORT)[0] == [expected]
        assert policy.encode(prompts) == [ids]
        assert MetricCallback(trainer, None, "name", prompts).prompts in ([PROMPT], [MESSAGES])
        path = collect(model, tokenizer, prompts, zero, tmp_path / str(number), SHORT, **ONE_BY_ONE)
        assert load_trajectories(path)["prompt_ids"] == [ids]
    assert policy.encode([]) == []
    both = decode(model, [ids, ids], SHORT).completions()
    assert decode(model, ids, SHORT).completions() == both[:1]


def test_what_is_no_prompt():
    for prompts, kind, message in (
        (5, TypeError, r"`prompts` must be text, a list of messages, or a list of prompts, got 5 \(int\)"),
        (DecodingConfig(8), TypeError, r"`prompts` must be text.*\(DecodingConfig\)"),
        (Dataset.from_dict({"prompt": [PROMPT]}), TypeError, r"got a dataset: pass its column, dataset\['prompt'\]"),
        ([1, 2, 3], ValueError, "Prompt 0: a prompt must be text or a list of messages, got 1"),
        ([PROMPT, None], ValueError, "Prompt 1 has no prompt"),
        ([[PROMPT]], ValueError, "Prompt 0: a prompt must be text or a list of messages"),
        ([], ValueError, "There is no prompt to answer"),
    ):
        with pytest.raises(kind, match=message):
            as_prompts(prompts)


def test_arguments_of_another_kind(model, tokenizer, trainer, tmp_path):
    """Each call has two arguments swapped, or one of another kind. Nothing is written."""
    prompts, out = Dataset.from_dict({"prompt": [PROMPT]}), tmp_path / "out"
    for call, message in (
        (lambda: generate("path", tokenizer, PROMPT), "`model` must be a model, got 'path'"),
        (lambda: generate(tokenizer, model, PROMPT), "`model` must be a model, got "),
        (lambda: generate(model, PROMPT, tokenizer), "`tokenizer` must be a tokenizer, got '1"),
        (lambda: generate(model, tokenizer, SHORT, PROMPT), "`config` must be a DecodingConfig, got '1"),
        (lambda: generate(model, tokenizer, PROMPT, {"temperature": 1.0}), "`config` must be a DecodingConfig, got {"),
        (lambda: generate(model, tokenizer, prompts), "got a dataset: pass its column"),
        (lambda: decode("path", [[5]], SHORT), "`model` must be a model, got 'path'"),
        (lambda: decode(model, SHORT, [[5]]), "`config` must be a DecodingConfig"),
        (lambda: decode(model, PROMPT, SHORT), r"`prompts` must be token ids.*\(`generate` takes text\), got '1"),
        (lambda: decode(model, [PROMPT], SHORT), r"`prompts` must be token ids.*\(`generate` takes text\), got '1"),
        (lambda: decode(model, [[PROMPT]], SHORT), r"`prompts` must be token ids.*\(`generate` takes text\), got \['1"),
        (lambda: trainer.answer(PROMPT, {"temperature": 1.0}), "`decoding` must be a DecodingConfig"),
        (lambda: collect("path", tokenizer, prompts, zero, out, SHORT), "`model` must be a model"),
        (lambda: collect(tokenizer, model, prompts, zero, out, SHORT), "`model` must be a model"),
        (lambda: collect(model, tokenizer, zero, prompts, out, SHORT), "`reward_funcs` must be a function, a reward model"),
        (lambda: collect(model, tokenizer, prompts, zero, SHORT, out), "`output_dir` must be a path, got Decod"),
        (lambda: collect(model, tokenizer, prompts, zero, out, {}), "`decoding` must be a DecodingConfig, got {}"),
        (lambda: collect(model, tokenizer, 5, zero, out, SHORT), "`prompts` must be text"),
        (lambda: get_spec(model), r"`config` must be the config of a model \(model.config\)"),
        (lambda: set_spec(get_spec(model.config), model.config), "`config` must be the config of a model"),
        (lambda: set_spec(model.config, {"mask_token_id": 1}), "`spec` must be a DiffusionSpec, got {"),
        (lambda: open_policy(model), "`path` must be a path or a hub id"),
        (lambda: Policy(tokenizer, model, get_spec(model.config)), "`model` must be a model"),
        (lambda: load_trajectories([str(out)]), "`path` must be the directory of a collection"),
        (lambda: Evaluation("path", out), r"`policy` must be an open policy \(`open_policy\(path\)`\), got 'path'"),
        (lambda: from_preferences([{}], tokenizer, get_spec(model.config)), "`dataset` must be a dataset of preference"),
        (lambda: DTRPOTrainer(tiny_policy_path(), prompts, trainer.args), "`reward_funcs` must be a function"),
        (lambda: DTRPOTrainer(tiny_policy_path(), trainer.args, zero), "`args` must be a DTRPOConfig"),
        (lambda: DTRPOTrainer(tiny_policy_path(), zero, trainer.args, prompts, processing_class="path"),
         "`processing_class` must be a tokenizer, got 'path'"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=message) as error:
            call()
        assert len(str(error.value)) < 300
    assert not out.exists()
