"""
The published families of diffusion language models: loaded without remote code, saved in their own format.

Each is a stock transformers backbone under another name, so PEFT, gradient checkpointing, attention implementations and
parallelism are those of transformers. `import trl_diffusion` registers them with the auto classes, and makes transformers' own
`generate` refuse diffusion policies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

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

    Conversion: TypeAlias = WeightConverter | WeightRenaming


# Config, and what `AutoModel` and `AutoModelForCausalLM` give for it (as in the families' own `auto_map`).
FAMILIES: dict[str, tuple[type[FamilyConfig], type[PreTrainedModel], type[PreTrainedModel]]] = {}


def add_family(
    name: str,
    config: type[FamilyConfig],
    model: type[PreTrainedModel],
    names: Mapping[str, str] | Sequence[Conversion] = (),
    base_model: type[PreTrainedModel] | None = None,
) -> None:
    """
    Adds a family: transformers' auto classes know it, its checkpoints load and save in their own format, and can be trained.

    Args:
        name (`str`): what the family is called in messages.
        config (`type[FamilyConfig]`): its config.
        model (`type[PreTrainedModel]`): its model, made of [`OwnAttention`] and a backbone of transformers. It has the name of the
            published class, since this name is saved.
        names (`Mapping[str, str]` or `Sequence`, *optional*): for each name of weights that is not the backbone's, as a regular
            expression, the backbone's. Or transformers' conversions, where weights are put together or divided.
        base_model (`type[PreTrainedModel]`, *optional*): what `AutoModel` gives. Defaults to `model`.
    """
    FAMILIES[name] = (config, base_model or model, model)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, base_model or model, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    if names:
        renamed = [WeightRenaming(*pair) for pair in names.items()] if isinstance(names, Mapping) else names
        register_checkpoint_conversion_mapping(config.model_type, [*renamed], overwrite=True)


EXPERTS: list[Conversion] = get_checkpoint_conversion_mapping("qwen2_moe")  # one by one on disk
add_family(
    "LLaDA", LLaDAConfig, LLaDAModelLM, {rf"^model\.transformer\.{theirs}": o for theirs, o in LLADA_NAMES.items()}
)
add_family("iLLaDA", ILLaDAConfig, ILLaDAForCausalLM)
add_family("Dream", DreamConfig, DreamModel)
AutoTokenizer.register(DreamConfig, tokenizer_class=DreamTokenizer, exist_ok=True)
add_family("Fast-dLLM v2", Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM, base_model=Fast_dLLM_QwenModel)
add_family("SDAR", SDARConfig, SDARForCausalLM, base_model=SDARModel)
add_family("SDAR-MoE", SDARMoeConfig, SDARMoeForCausalLM, EXPERTS, SDARMoeModel)
add_family("LLaDA-MoE", LLaDAMoEConfig, LLaDAMoEModelLM, EXPERTS)
add_family("LLaDA 2", LLaDA2MoeConfig, LLaDA2MoeModelLM, [*LLADA2_NAMES, *EXPERTS], LLaDA2MoeModel)
add_family("Nemotron-Labs-Diffusion", NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel, NEMOTRON_NAMES)
add_family("dllm A2D Qwen2", A2DQwen2Config, A2DQwen2LMHeadModel)
add_family("dllm A2D Qwen3", A2DQwen3Config, A2DQwen3LMHeadModel)
refuse_policies()
