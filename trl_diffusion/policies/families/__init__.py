"""
The published families of diffusion language models: loaded without remote code, saved in their own format.

Each is a stock transformers backbone under another name, so PEFT, gradient checkpointing, attention implementations and
parallelism are those of transformers. `import trl_diffusion` registers them with the auto classes, and makes transformers' own
`generate` refuse diffusion policies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from ..left_to_right import refuse_policies
from .configs import (
    A2DQwen2Config,
    A2DQwen3Config,
    DreamConfig,
    Fast_dLLM_QwenConfig,
    LLaDAConfig,
    NemotronLabsDiffusionConfig,
    SDARConfig,
)
from .models import (
    LLADA_NAMES,
    NEMOTRON_NAMES,
    A2DQwen2LMHeadModel,
    A2DQwen3LMHeadModel,
    DreamModel,
    DreamTokenizer,
    Fast_dLLM_QwenForCausalLM,
    Fast_dLLM_QwenModel,
    LLaDAModelLM,
    NemotronLabsDiffusionModel,
    SDARForCausalLM,
    SDARModel,
)


if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

    from .configs import FamilyConfig


# Config, and what `AutoModel` and `AutoModelForCausalLM` give for it (as in the families' own `auto_map`).
FAMILIES: dict[str, tuple[type[FamilyConfig], type[PreTrainedModel], type[PreTrainedModel]]] = {
    "LLaDA": (LLaDAConfig, LLaDAModelLM, LLaDAModelLM),
    "Dream": (DreamConfig, DreamModel, DreamModel),
    "Fast-dLLM v2": (Fast_dLLM_QwenConfig, Fast_dLLM_QwenModel, Fast_dLLM_QwenForCausalLM),
    "SDAR": (SDARConfig, SDARModel, SDARForCausalLM),
    "Nemotron-Labs-Diffusion": (NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel, NemotronLabsDiffusionModel),
    "dllm A2D Qwen2": (A2DQwen2Config, A2DQwen2LMHeadModel, A2DQwen2LMHeadModel),
    "dllm A2D Qwen3": (A2DQwen3Config, A2DQwen3LMHeadModel, A2DQwen3LMHeadModel),
}


def register() -> None:
    """Tells transformers' auto classes about the families, and its loading and saving about their weight names."""
    for config, model, causal_lm in FAMILIES.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
    AutoTokenizer.register(DreamConfig, tokenizer_class=DreamTokenizer, exist_ok=True)
    names: list[WeightConverter | WeightRenaming] = [
        WeightRenaming(rf"^model\.transformer\.{theirs}", ours) for theirs, ours in LLADA_NAMES.items()
    ]
    register_checkpoint_conversion_mapping(LLaDAConfig.model_type, names, overwrite=True)
    nemotron: list[WeightConverter | WeightRenaming] = [WeightRenaming(*names) for names in NEMOTRON_NAMES.items()]
    register_checkpoint_conversion_mapping(NemotronLabsDiffusionConfig.model_type, nemotron, overwrite=True)


register()
refuse_policies()
