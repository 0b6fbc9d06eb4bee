"""Conversations as token ids, the same wherever they become them: variables of the template, and started answers."""

from __future__ import annotations

import copy
import json

import pyarrow.parquet as parquet
import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.conftest import char_spec, make_trainer, tokenizer  # noqa: F401
from trl_diffusion import DecodingConfig, DTRPOConfig, collect, from_preferences, generate, tiny_policy_path
from trl_diffusion.commands import generate as command
from trl_diffusion.policies.policy import Policy
from trl_diffusion.policies.prompts import check_visible, tokenize_prompts, tokenize_responses


# A header and a mark at the end of each message; without thoughts, a new answer begins behind an empty one.
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}<a>{% if enable_thinking is defined and not enable_thinking %}[]{% endif %}{% endif %}"
)
USER = {"role": "user", "content": "1+1"}
ASKED, STARTED = [USER], [USER, {"role": "assistant", "content": "It is "}]
OFF = {"enable_thinking": False}
CASES = {
    "plain": (ASKED, {}, "<u>1+1;<a>"),
    "thinking off": (ASKED, OFF, "<u>1+1;<a>[]"),
    "started": (STARTED, OFF, "<u>1+1;<a>It is "),
}


def test_a_tokenizer_without_a_template(make_trainer, tokenizer):  # noqa: F811
    """It is said in one way, by a trainer as by `generate`."""
    trainer = make_trainer(tiny_policy_path())
    message = r"^Prompt 0: .* of \['user'\] \(the tokenizer has none; text needs none\). Use another chat template, or other prompts.$"
    for ask in (trainer.answer, lambda prompts: generate(trainer.model, trainer.processing_class, prompts)):
        with pytest.raises(ValueError, match=message):
            ask([ASKED])


@pytest.fixture
def chatty(tokenizer):  # noqa: F811
    found = copy.deepcopy(tokenizer)
    found.chat_template = TEMPLATE
    return found


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_policy_path(), trust_remote_code=False)


def of_function(model, tokenizer, spec, prompt, template, tmp_path):  # noqa: F811
    """All prompts of a batch, some of them started."""
    ids = tokenize_prompts(tokenizer, [ASKED, prompt, STARTED], **template)
    check_visible(tokenizer, [prompt], ids[1:2], **template)
    return ids[1]


def of_generate(model, tokenizer, spec, prompt, template, tmp_path):  # noqa: F811
    batch = generate(
        model, tokenizer, prompt, max_new_tokens=8, tokens_per_step=8, chat_template_kwargs=template
    ).trajectories
    return batch.prompt_ids[0][batch.prompt_mask[0] > 0].tolist()


def of_policy(model, tokenizer, spec, prompt, template, tmp_path):  # noqa: F811
    return Policy(model, tokenizer, spec, template).encode([prompt])[0]


def of_harness(model, tokenizer, spec, prompt, template, tmp_path):  # noqa: F811
    harness = pytest.importorskip("trl_diffusion.evaluation.harness")
    lm = harness.DiffusionLM(policy=Policy(model, tokenizer, spec, template))
    assert lm.get_model_info()["chat_template_kwargs"] == template
    return lm.tok_encode(lm.apply_chat_template(prompt, add_generation_prompt=prompt is not STARTED))


def constant(completions, **kwargs):
    return [1.0] * len(completions)


def of_collect(model, tokenizer, spec, prompt, template, tmp_path):  # noqa: F811
    directory = collect(
        model, tokenizer, Dataset.from_list([{"prompt": prompt}]), constant, tmp_path / "stored",
        DecodingConfig(8, tokens_per_step=8), num_responses=1, spec=spec, disable_tqdm=True, chat_template_kwargs=template,
    )  # fmt: skip
    assert json.loads((directory / "collection.json").read_text()).get("chat_template_kwargs", {}) == template
    return parquet.read_table(directory / "data").to_pylist()[0]["prompt_ids"]


def of_preferences(model, tokenizer, spec, prompt, template, tmp_path):  # noqa: F811
    pair = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "2"), ("rejected", "34"))}
    rows = Dataset.from_list([{"prompt": prompt, **pair}])
    stored = from_preferences(rows, tokenizer, spec, chat_template_kwargs=template)[0]
    return stored["prompt_ids"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", [of_function, of_generate, of_policy, of_harness, of_collect, of_preferences])
def test_the_policy_is_asked_the_same_everywhere(way, case, model, chatty, char_spec, tmp_path):  # noqa: F811
    prompt, template, expected = CASES[case]
    assert chatty.decode(way(model, chatty, char_spec, prompt, template, tmp_path)) == expected


@pytest.mark.parametrize("prompt", [ASKED, STARTED])
def test_preferences_train_on_conversations(make_trainer, chatty, prompt):  # noqa: F811
    """The trainer asks as the pairs were stored, or it would refuse them; responses go on where prompts end."""
    pair = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "2"), ("rejected", "34"))}
    trainer = make_trainer(
        reward_funcs=None, dataset=Dataset.from_list([{"prompt": prompt, **pair}] * 4), kwargs={"processing_class": chatty},
        loss_type="dpo", beta=0.0, dpo_loss_type=["sft"], num_generations=2, max_steps=1, chat_template_kwargs=OFF,
    )  # fmt: skip
    texts = chatty.batch_decode(trainer._tokenize_prompts([prompt, ASKED])[0])
    assert texts == [CASES["started" if prompt is STARTED else "thinking off"][2], CASES["thinking off"][2]]
    trainer.train()
    row, end = trainer.train_dataset[0], chatty.eos_token_id
    for tokens, positions, text in zip(row["event_tokens"], row["event_positions"], ("2;", "34;"), strict=True):
        ids = [token for _, token in sorted(zip(positions, tokens, strict=True))]
        assert chatty.decode(ids) == f"{text}{chatty.decode([end])}"


def test_a_template_that_changes_a_started_answer(chatty, char_spec):  # noqa: F811
    chatty.chat_template = "{% for m in messages %}{{ m['content'] if loop.last else m['content'][:1] }};{% endfor %}"
    row = {
        "prompt": STARTED, "chosen": [{"role": "assistant", "content": "2"}, USER], "rejected": [{"role": "assistant", "content": "3"}],
    }  # fmt: skip
    with pytest.raises(ValueError, match="column `chosen`: the chat template does not keep the beginning.*'It is '"):
        tokenize_responses(chatty, row, char_spec)


def test_the_command_takes_them(monkeypatch, chatty, capsys):
    monkeypatch.setattr(
        "trl_diffusion.policies.policy.load_tokenizer",
        lambda path, **options: chatty if path == "chatty" else AutoTokenizer.from_pretrained(path),
    )
    seen, apply = [], chatty.apply_chat_template
    chatty.apply_chat_template = lambda *args, **options: seen.append(options) or apply(*args, **options)
    words = [
        "1+1",
        "--tokenizer",
        "chatty",
        "--max_new_tokens",
        "4",
        "--chat_template_kwargs",
        "enable_thinking:false",
    ]
    assert command.main([*words, "--chat"]) == 0
    assert [options["enable_thinking"] for options in seen] == [False]
    assert command.main(words) == 2 and "is for conversations: add --chat" in capsys.readouterr().err


@pytest.mark.parametrize("given", [{"tokenize": False}, {"add_generation_prompt": False, "enable_thinking": False}])
def test_what_is_not_for_the_template(given, tmp_path):
    with pytest.raises(
        ValueError, match=f"`chat_template_kwargs` holds \\['{next(iter(given))}'\\], which this library"
    ):
        DTRPOConfig(str(tmp_path), bf16=False, chat_template_kwargs=given)
