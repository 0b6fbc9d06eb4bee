"""The model card: the paper, the policy before training, and an example that runs."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig

from trl_diffusion import tiny_policy_path


def written(trainer, **options) -> tuple[str, ModelCard]:
    trainer.create_model_card(**options)
    text = Path(trainer.args.output_dir, "README.md").read_text()
    return text, ModelCard(text)


def test_what_it_says(make_trainer):
    text, card = written(make_trainer(tiny_policy_path()), dataset_name="org/puzzles", tags="mine")
    assert "https://huggingface.co/papers/2603.18806" in text and "arXiv:2603.18806" in text
    assert "2402.03300" not in text and "None" not in text and 'pipeline("' not in text
    assert "`tiny_policy` (a local directory)" in text and str(Path(tiny_policy_path()).parent) not in text
    assert card.data.base_model is None and card.data.datasets == "org/puzzles"
    assert {"trl-diffusion", "dtrpo", "mine", "generated_from_trainer"} <= set(card.data.tags)


@pytest.mark.parametrize(
    ("name", "said", "base"),
    [
        ("org/policy", "[org/policy](https://huggingface.co/org/policy)", "org/policy"),
        ("", "a model that was made in memory", None),
        ("/somebody/s/policy-7b", "`policy-7b` (a local directory)", None),
    ],
)
def test_the_policy_before_training(make_trainer, name, said, base):
    trainer = make_trainer()
    trainer.model.config._name_or_path = name
    text, card = written(trainer)
    assert f"A diffusion language model: {said}, trained with" in text and card.data.base_model == base


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_the_example_runs(make_trainer, tokenizer, tmp_path, adapter, chat):
    """On the directory that the trainer saves to, and it answers as the trainer does."""
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}{{ m['content'] }}{% if on %}=\n{% endif %}{% endfor %}"
    prompts = [[{"role": "user", "content": "..."}]] if chat else ["..."]
    trainer = make_trainer(
        tiny_policy_path(),
        dataset=Dataset.from_list([{"prompt": prompts[0]}] * 4),
        kwargs={"processing_class": chatty, "peft_config": LoraConfig(r=2) if adapter else None},
        **({"chat_template_kwargs": {"on": True}} if chat else {}),
    )
    trainer.save_model(str(tmp_path))
    text, _ = written(trainer)
    found: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], found)
    assert found["answers"].texts == trainer.answer(prompts)[0]
