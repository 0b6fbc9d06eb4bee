"""The configs of the families: a stock transformers config that reads and writes the family's own `config.json`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import LlamaConfig, Qwen2Config, Qwen3Config


if TYPE_CHECKING:
    from transformers import PretrainedConfig

    _Backbone = PretrainedConfig
else:
    _Backbone = object  # the config that a family's is mixed with


class FamilyConfig(_Backbone):
    """
    What the configs of the families share. In memory such a config has the names of its backbone (`hidden_size`,
    `rope_parameters`, ...), and the family's names are other spellings of them; on disk it has the family's names.

    Class attributes:
        published_mask_id (`int`):
            Mask token of the published vocabulary. A config with another one has another vocabulary.
        published_stop_ids (`tuple[int, ...]`):
            Tokens at which the published models stop; none if the config names them all.
        mask_token (`str`, *optional*):
            How the tokenizer spells the mask token, where the config does not say which id it has.
        denoising (`dict`):
            The facts of [`DiffusionSpec`] that are the same for every checkpoint of the family.
        unsaid (`dict[str, str]`):
            Fields of [`DiffusionSpec`] in which its checkpoints differ although their configs do not say so, each with what the
            user is told.
        backbone_only (`tuple[str, ...]`):
            Entries of the backbone's config that the family's `config.json` does not have.
    """

    published_mask_id: ClassVar[int]
    published_stop_ids: ClassVar[tuple[int, ...]] = ()
    mask_token: ClassVar[str | None] = None
    denoising: ClassVar[dict[str, Any]]
    unsaid: ClassVar[dict[str, str]] = {}
    backbone_only: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:  # the backbone's
        eos_token_id: int | list[int] | None
        mask_token_id: int | None

    def __post_init__(self, **kwargs):
        # The backbone derives some values from others (`head_dim`), so the family's names are read before it does.
        for name in sorted(kwargs.keys() & self.attribute_map.keys()):
            setattr(self, name, kwargs.pop(name))
        kwargs.setdefault("auto_map", {})  # TRL looks at it
        super().__post_init__(**kwargs)

    def spec_fields(self) -> dict[str, Any]:
        """What this config says about the fields of [`DiffusionSpec`]; without `mask_token_id` if it does not."""
        mask = self._mask_token_id()
        stops = (mask == self.published_mask_id and self.published_stop_ids) or self.eos_token_id
        stop_ids = () if stops is None else (stops,) if isinstance(stops, int) else tuple(stops)
        found = {} if mask is None else {"mask_token_id": mask}
        return {**self.denoising, "stop_token_ids": stop_ids, "predicts_mask_token": True, **found}

    def _mask_token_id(self) -> int | None:
        return self.mask_token_id

    def to_json_string(self, use_diff: bool = True) -> str:
        """The content of the family's own `config.json`."""
        values = json.loads(super().to_json_string(use_diff=use_diff))
        for name, backbone_name in self.attribute_map.items():
            values[name] = values.pop(backbone_name)
        rope = values.pop("rope_parameters", None) or {}
        values["rope_theta"] = rope.pop("rope_theta", None)
        values["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        if "dtype" in values:
            values["torch_dtype"] = values.pop("dtype")
        if values.get("auto_map") and _is_hub_id(self._name_or_path):  # where the family's code is, for its own tools
            values["auto_map"] = {
                name: code if "--" in code else f"{self._name_or_path}--{code}"
                for name, code in values["auto_map"].items()
            }
        unset = [name for name in ("auto_map", "mask_token_id") if not values.get(name) and values.get(name) != 0]
        for name in (*self.backbone_only, *unset):
            values.pop(name, None)
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


class LLaDAConfig(FamilyConfig, LlamaConfig):
    """
    LLaDA on a Llama backbone.

    Raises:
        ValueError: if the checkpoint uses an option of the LLaDA code that a Llama backbone does not have. No public
            checkpoint does.
    """

    model_type = "llada"
    attribute_map = {
        "activation_type": "hidden_act",
        "d_model": "hidden_size",
        "embedding_size": "vocab_size",
        "init_std": "initializer_range",
        "max_sequence_length": "max_position_embeddings",
        "mlp_hidden_size": "intermediate_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "n_layers": "num_hidden_layers",
        "weight_tying": "tie_word_embeddings",
    }
    # What a Llama backbone computes, in LLaDA's words.
    backbone_options: ClassVar[dict[str, Any]] = {
        "alibi": False,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "clip_qkv": None,
        "embedding_dropout": 0.0,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "residual_dropout": 0.0,
        "rope": True,
        "scale_logits": False,
    }
    backbone_only = ("attention_bias", "head_dim", "mlp_bias", "pretraining_tp", "bos_token_id", "rope_scaling")
    published_mask_id = 126336
    published_stop_ids = (126081, 126348)
    denoising = {"attention": "full", "block_size": 32, "block_origin": "response"}

    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mask_token_id: int | None = None
    tokenizer_vocab_size: int | None = None  # `vocab_size` on disk; `embedding_size` is the backbone's vocabulary

    def __post_init__(self, **kwargs):
        for name, expected in self.backbone_options.items():
            value = kwargs.setdefault(name, expected)
            if value != expected and not (name == "bias_for_layer_norm" and value is None):
                raise ValueError(
                    f"This LLaDA config has `{name}={value!r}`, which a Llama backbone cannot express; only "
                    f"{expected!r} can be loaded."
                )
        if kwargs.get("activation_type", "silu") not in ("silu", "gelu", "relu"):
            raise ValueError(
                f"This LLaDA config has `activation_type={kwargs['activation_type']!r}`; a Llama backbone can be loaded "
                "with 'silu' (as in all public checkpoints), 'gelu' or 'relu'."
            )
        if self.tokenizer_vocab_size is None:
            self.tokenizer_vocab_size = self.vocab_size
        if not kwargs.get("embedding_size"):
            kwargs["embedding_size"] = self.vocab_size
        if "d_model" in kwargs and kwargs.get("mlp_hidden_size") is None:
            kwargs["mlp_hidden_size"] = kwargs.get("mlp_ratio", 4) * kwargs["d_model"]
        if "n_heads" in kwargs and kwargs.get("n_kv_heads") is None:
            kwargs["n_kv_heads"] = 1 if kwargs.get("multi_query_attention") else kwargs["n_heads"]
        super().__post_init__(**kwargs)

    def to_json_string(self, use_diff: bool = True) -> str:
        values = json.loads(super().to_json_string(use_diff=use_diff))
        values["vocab_size"] = values.pop("tokenizer_vocab_size")
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


class DreamConfig(FamilyConfig, Qwen2Config):
    """Dream and DiffuCoder on a Qwen2 backbone."""

    model_type = "Dream"
    backbone_only = ("layer_types",)
    published_mask_id = 151666
    published_stop_ids = (151643, 151645)
    denoising = {"attention": "full", "block_size": 32, "block_origin": "response", "token_shift": True}

    mask_token_id: int | None = None


class Fast_dLLM_QwenConfig(FamilyConfig, Qwen2Config):
    """Fast-dLLM v2 on a Qwen2 backbone. Its config does not say which token is the mask; its tokenizer does."""

    model_type = "Fast_dLLM_Qwen"
    published_mask_id = 151665
    published_stop_ids = (151645,)
    mask_token = "|<MASK>|"
    denoising = {
        "attention": "block",
        "block_origin": "sequence",
        "token_shift": True,
        "first_token": "autoregressive",
    }

    bd_size: int = 32
    mask_token_id: int | None = None

    def spec_fields(self) -> dict[str, Any]:
        return {**super().spec_fields(), "block_size": self.bd_size}

    def _mask_token_id(self) -> int | None:
        if self.mask_token_id is None and self.vocab_size > self.published_mask_id:
            return self.published_mask_id
        return self.mask_token_id


class SDARConfig(FamilyConfig, Qwen3Config):
    """SDAR and TraDo on a Qwen3 backbone."""

    model_type = "sdar"
    backbone_only = ("layer_types",)
    published_mask_id = 151669
    published_stop_ids = (151643, 151645)
    denoising = {"attention": "block", "block_origin": "sequence"}

    block_size: int = 4
    mask_token_id: int | None = None

    def spec_fields(self) -> dict[str, Any]:
        return {**super().spec_fields(), "block_size": self.block_size}
