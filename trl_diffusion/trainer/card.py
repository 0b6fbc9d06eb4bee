"""The model card of a trained policy. It names the policy before training, the settings of the training, and how to use it."""

from __future__ import annotations

import re
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel

from ..decoding.config import DecodingConfig
from ..policies.forward import unwrap


if TYPE_CHECKING:
    from ..sft.trainer import DiffusionSFTTrainer
    from .trainer import DTRPOTrainer

    Trainer: TypeAlias = DTRPOTrainer | DiffusionSFTTrainer


PAPER = {
    "title": "dTRPO: dLLM Trajectory Reduction Policy Optimization",
    "id": "2603.18806",
    "citation": """@misc{dtrpo2026,
  title = {{dTRPO}: {dLLM} Trajectory Reduction Policy Optimization},
  year  = {2026},
  note  = {ICML 2026, arXiv:2603.18806},
  url   = {https://huggingface.co/papers/2603.18806}
}""",
}
VERSIONS = ("trl", "transformers", "torch", "datasets")


def model_card(
    trainer: DTRPOTrainer, model_name: str | None = None, dataset_name: str | None = None, tags: tuple[str, ...] = ()
) -> ModelCard:
    """
    The card of the policy of a trainer.

    Args:
        trainer ([`DTRPOTrainer`]): the trainer.
        model_name (`str`, *optional*): name of the policy. Defaults to the name of the output directory.
        dataset_name (`str`, *optional*): the dataset on the hub that it was trained on.
        tags (`tuple[str, ...]`, *optional*): tags in addition to those of the trainer.
    """
    args = trainer.args
    settings = {
        "loss": f"`{args.loss_type}`",
        "estimator": f"`{args.estimator}`",
        "`num_draws`": args.num_draws,
        "reference (`beta`)": f"{trainer.beta:g}",
    }
    how = f"[dTRPO](https://huggingface.co/papers/{PAPER['id']})"
    example = _example(
        trainer, trainer.args.decoding(temperature=0.0), cast("dict[str, Any]", trainer.chat_template_kwargs)
    )
    return _card(trainer, how, settings, example, PAPER["citation"], model_name, dataset_name, tags)


def tuning_card(
    trainer: DiffusionSFTTrainer,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: tuple[str, ...] = (),
) -> ModelCard:
    """As [`model_card`], for a [`DiffusionSFTTrainer`]."""
    args = trainer.args
    settings = {
        "loss of masked tokens": f"`{args.weighting}`",
        "masks of a document": f"{args.num_masks}{', each with its complement' if args.complementary else ''}",
        "largest share of wrong tokens": f"{args.max_corruption:g}",
    }
    example = _example(trainer, DecodingConfig(), {})
    return _card(trainer, "supervised fine-tuning", settings, example, "", model_name, dataset_name, tags)


def _card(
    trainer: Trainer,
    how: str,
    settings: dict[str, Any],
    example: str,
    citation: str,
    model_name: str | None,
    dataset_name: str | None,
    tags: tuple[str, ...],
) -> ModelCard:
    """The card, with the name of the method and the settings that are its own."""
    args = trainer.args
    base = getattr(unwrap(trainer.model).config, "_name_or_path", "") or ""
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) is not None and not Path(base).is_dir()
    model_name = model_name or Path(str(args.output_dir)).name
    data = ModelCardData(
        base_model=base if on_hub else None,
        datasets=dataset_name,
        library_name="transformers",
        license=None,
        model_name=model_name,
        tags=sorted({"generated_from_trainer", *trainer._tag_names, *tags}),
    )
    dataset = f" on [{dataset_name}](https://huggingface.co/datasets/{dataset_name})" if dataset_name else ""
    settings |= {"learning rate": f"{args.learning_rate:g}", "optimizer steps": trainer.state.global_step}
    table = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    versions = "\n".join(f"| {name} | {version(name)} |" for name in ("trl-diffusion", *VERSIONS))
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# {model_name}

A diffusion language model: {_base(base, on_hub)}, trained{dataset} with {how} by
trl_diffusion, on [TRL](https://github.com/huggingface/trl). It writes by denoising, so `transformers.pipeline` and the model's
own `generate`, which write from left to right, give nonsense. Once `trl_diffusion` is imported, they refuse.

```python
{example}
```

| trained with | |
|---|---|
{table}

| package | version |
|---|---|
{versions}
"""
        + (f"\n```bibtex\n{citation}\n```\n" if citation else "")
    )


def _base(name: str, on_hub: bool) -> str:
    """Names the policy before training. Only the last part of a local path is shown, because cards are published."""
    if on_hub:
        return f"[{name}](https://huggingface.co/{name})"
    return f"`{Path(name).name}` (a local directory)" if name else "a model that was made in memory"


def _example(trainer: Trainer, config: DecodingConfig, template: dict[str, Any] | None) -> str:
    """Python code that generates a response, with settings of the decoder and variables of the chat template."""
    defaults = DecodingConfig()
    changed = {one.name for one in fields(config) if getattr(config, one.name) != getattr(defaults, one.name)}
    settings = {name: getattr(config, name) for name in sorted(changed | {"max_new_tokens"})}
    where = str(trainer.hub_model_id or trainer.args.hub_model_id or trainer.args.output_dir)
    options: dict[str, Any] = {"path": where}
    if isinstance(unwrap(trainer.model), PeftModel):
        options = {"adapter": where, "tokenizer": where}
        if trainer.args.spec_overrides():  # which the directory of an adapter does not hold
            options["diffusion_spec"] = trainer.args.spec_overrides()
    prompt: Any = "..."
    if _is_conversational(trainer):
        prompt = [{"role": "user", "content": "..."}]
        if template:
            settings["chat_template_kwargs"] = template
    return "\n".join(
        [
            "from trl_diffusion import generate",
            "from trl_diffusion.policies.policy import open_policy",
            "",
            f"policy = open_policy({_keywords(options)})",
            f"prompt = {prompt!r}",
            "answers = generate(",
            "    policy.model, policy.tokenizer, prompt, spec=policy.spec,",
            *(f"    {_keywords({name: value})}," for name, value in settings.items()),
            ")",
            "print(answers.texts[0])",
        ]
    )


def _is_conversational(trainer: Trainer) -> bool:
    """Whether the policy was trained on messages. Without prompts to look at, a chat template decides."""
    dataset = trainer.train_dataset
    if isinstance(dataset, Dataset) and len(dataset) and "prompt" in dataset.column_names:
        return not isinstance(dataset[0]["prompt"], str)
    return getattr(trainer.processing_class, "chat_template", None) is not None


def _keywords(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
