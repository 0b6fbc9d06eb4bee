"""
The published families of diffusion language models: loaded without remote code, saved in their own format.

Each is a stock transformers backbone under another name, so PEFT, gradient checkpointing, attention implementations and
parallelism are those of transformers. `import trl_diffusion` registers them with the auto classes, and makes transformers' own
`generate` refuse diffusion policies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from ..left_to_right import refuse_policies
from .configs import (
    DreamConfig,
    Fast_dLLM_QwenConfig,
    ILLaDAConfig,
    LLaDA2MoeConfig,
    LLaDAConfig,
    LLaDAMoEConfig,
    SDARConfig,
    SDARMoeConfig,
)
from .models import (
    LLADA2_NAMES,
    LLADA_NAMES,
    DreamModel,
    DreamTokenizer,
    Fast_dLLM_QwenForCausalLM,
    Fast_dLLM_QwenModel,
    ILLaDAForCausalLM,
    LLaDA2MoeModel,
    LLaDA2MoeModelLM,
    LLaDAModelLM,
    LLaDAMoEModelLM,
    SDARForCausalLM,
    SDARModel,
    SDARMoeForCausalLM,
    SDARMoeModel,
)
from .nemotron import NAMES as NEMOTRON_NAMES
from .nemotron import NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel
from .tiny_a2d import A2DQwen2Config, A2DQwen2LMHeadModel, A2DQwen3Config, A2DQwen3LMHeadModel


if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

    from .configs import FamilyConfig


# Config, and what `AutoModel` and `AutoModelForCausalLM` give for it (as in the families' own `auto_map`).
FAMILIES: dict[str, tuple[type[FamilyConfig], type[PreTrainedModel], type[PreTrainedModel]]] = {
    "LLaDA": (LLaDAConfig, LLaDAModelLM, LLaDAModelLM),
    "iLLaDA": (ILLaDAConfig, ILLaDAForCausalLM, ILLaDAForCausalLM),
    "Dream": (DreamConfig, DreamModel, DreamModel),
    "Fast-dLLM v2": (Fast_dLLM_QwenConfig, Fast_dLLM_QwenModel, Fast_dLLM_QwenForCausalLM),
    "SDAR": (SDARConfig, SDARModel, SDARForCausalLM),
    "SDAR-MoE": (SDARMoeConfig, SDARMoeModel, SDARMoeForCausalLM),
    "LLaDA-MoE": (LLaDAMoEConfig, LLaDAMoEModelLM, LLaDAMoEModelLM),
    "LLaDA 2": (LLaDA2MoeConfig, LLaDA2MoeModel, LLaDA2MoeModelLM),
}


def register() -> None:
    """Tells transformers' auto classes about the families, and its loading and saving about their weight names."""
    for config, model, causal_lm in FAMILIES.values():
        _announce(config, model, causal_lm)
    AutoTokenizer.register(DreamConfig, tokenizer_class=DreamTokenizer, exist_ok=True)
    experts: list[WeightConverter | WeightRenaming] = get_checkpoint_conversion_mapping(
        "qwen2_moe"
    )  # one by one on disk
    names: dict[str, list[WeightConverter | WeightRenaming]] = {
        LLaDAConfig.model_type: [
            WeightRenaming(rf"^model\.transformer\.{theirs}", ours) for theirs, ours in LLADA_NAMES.items()
        ],
        SDARMoeConfig.model_type: experts,
        LLaDAMoEConfig.model_type: experts,
        LLaDA2MoeConfig.model_type: [*LLADA2_NAMES, *experts],
    }
    for model_type, converters in names.items():
        register_checkpoint_conversion_mapping(model_type, converters, overwrite=True)


def _announce(config: type[FamilyConfig], model: type[PreTrainedModel], causal_lm: type[PreTrainedModel]) -> None:
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)


def add_family(
    name: str, config: type[FamilyConfig], model: type[PreTrainedModel], names: Mapping[str, str] | None = None
) -> None:
    """
    Adds a family: its checkpoints then load and save in their own format, and can be trained.

    Args:
        name (`str`): what the family is called in messages.
        config (`type[FamilyConfig]`): its config.
        model (`type[PreTrainedModel]`): its model, made of [`OwnAttention`] and a backbone of transformers. It has the name of the
            published class, since this name is saved.
        names (`Mapping[str, str]`, *optional*): for each name of weights that is not the backbone's, as a regular expression,
            the backbone's.
    """
    FAMILIES[name] = (config, model, model)
    _announce(config, model, model)
    if names:
        renamed: list[WeightConverter | WeightRenaming] = [WeightRenaming(*pair) for pair in names.items()]
        register_checkpoint_conversion_mapping(config.model_type, renamed, overwrite=True)


register()
add_family("Nemotron-Labs-Diffusion", NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel, NEMOTRON_NAMES)
add_family("dllm A2D Qwen2", A2DQwen2Config, A2DQwen2LMHeadModel)
add_family("dllm A2D Qwen3", A2DQwen3Config, A2DQwen3LMHeadModel)
refuse_policies()
