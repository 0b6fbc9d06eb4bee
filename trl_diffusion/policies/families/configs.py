"""The configs of the families: a stock transformers config that reads and writes the family's own `config.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import Glm4MoeConfig, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from ...links import link


if TYPE_CHECKING:
    from transformers import PretrainedConfig

    _Backbone = PretrainedConfig
else:
    _Backbone = object  # the config that a family's is mixed with

HOW_TO = "docs/howto/family.md"
# Sizes that a `config.json` has to state, since a backbone's defaults are those of another model.
DIMENSIONS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
)  # fmt: skip
# What configs call the number of experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


class FamilyConfig(_Backbone):
    """
    What the configs of the families share. In memory such a config has the names of its backbone (`hidden_size`,
    `rope_parameters`, ...), and the family's names are other spellings of them; on disk it has the family's names.

    Class attributes:
        published_mask_id (`int`):
            Mask token of the published vocabulary. A config with another one has another vocabulary.
        published_vocab_size (`int`, *optional*):
            Entries of the published vocabulary, where its mask token is not the config's to say. A config with another number of
            them has another vocabulary.
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
        own_names (`dict[str, str]`):
            The family's names of what the backbone's config has under another name.
        backbone_options (`dict`):
            Options of the family's code that its backbone lacks, with the only value that it can compute.
        dimensions (`tuple[str, ...]`):
            Sizes that the family's `config.json` has to state.
        has_experts (`bool`):
            Whether the backbone is a mixture of experts.
    """

    published_mask_id: ClassVar[int]
    published_vocab_size: ClassVar[int | None] = None
    published_stop_ids: ClassVar[tuple[int, ...]] = ()
    mask_token: ClassVar[str | None] = None
    denoising: ClassVar[dict[str, Any]]
    unsaid: ClassVar[dict[str, str]] = {}
    backbone_only: ClassVar[tuple[str, ...]] = ()
    own_names: ClassVar[dict[str, str]] = {}
    backbone_options: ClassVar[dict[str, Any]] = {}
    dimensions: ClassVar[tuple[str, ...]] = DIMENSIONS
    has_experts: ClassVar[bool] = False

    if TYPE_CHECKING:  # the backbone's
        eos_token_id: int | list[int] | None
        mask_token_id: int | None

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """
        As in transformers.

        Raises:
            ValueError: naming the sizes that a `config.json` does not state.
        """
        unsaid = [
            name for name in cls.dimensions if config_dict.keys().isdisjoint({name, cls.attribute_map.get(name)})
        ]
        if unsaid:
            raise ValueError(
                f"This `{config_dict.get('model_type', cls.model_type)}` config does not state {', '.join(unsaid)}, as the "
                f"config of {cls._family()} does. Is it the checkpoint's own `config.json`? Another model needs a family of "
                f"its own ({link(HOW_TO)})."
            )
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _family(cls) -> str:
        return cls.__name__.removesuffix("Config")

    def __post_init__(self, **kwargs):
        self._check_backbone(kwargs)
        # The backbone derives some values from others (`head_dim`), so the family's names are read before it does.
        for name in sorted(kwargs.keys() & self.attribute_map.keys()):
            setattr(self, name, kwargs.pop(name))
        kwargs.setdefault("auto_map", {})  # TRL looks at it
        super().__post_init__(**kwargs)

    def _check_backbone(self, kwargs: dict[str, Any]) -> None:
        """Raises a `ValueError` if the backbone cannot compute what the config says."""
        experts = [name for name in EXPERTS if not self.has_experts and kwargs.get(name)]
        if experts:
            raise ValueError(
                f"This `{self.model_type}` config has `{experts[0]}={kwargs[experts[0]]}`: a mixture of experts, which "
                f"{self._family()} is not. Its weights would be left out. Use the `model_type` of a family with experts, or "
                f"add its family ({link(HOW_TO)})."
            )
        for name, expected in self.backbone_options.items():
            value = kwargs.setdefault(name, expected)
            if value is not None and value != expected and (value or expected):
                raise ValueError(
                    f"This {self._family()} config has `{name}={value!r}`, which a {_stock(type(self))} backbone cannot "
                    f"express; only {expected!r} can be loaded."
                )

    def spec_fields(self) -> dict[str, Any]:
        """What this config says about the fields of [`DiffusionSpec`]; without `mask_token_id` if it does not."""
        mask = self._mask_token_id()
        stops = (mask == self.published_mask_id and self.published_stop_ids) or self.eos_token_id
        stop_ids = () if stops is None else (stops,) if isinstance(stops, int) else tuple(stops)
        found = {} if mask is None else {"mask_token_id": mask}
        return {**self.denoising, "stop_token_ids": stop_ids, "predicts_mask_token": True, **found}

    def left_open(self, values: Mapping[str, Any]) -> dict[str, str]:
        """The entries of `unsaid` that the user has to give, if these fields are known."""
        return {name: what for name, what in self.unsaid.items() if name not in values}

    def _mask_token_id(self) -> int | None:
        return self.mask_token_id

    def to_json_string(self, use_diff: bool = True) -> str:
        """The content of the family's own `config.json`."""
        values = json.loads(super().to_json_string(use_diff=use_diff))
        for name, backbone_name in self.own_names.items():
            if backbone_name in values:
                values[name] = values.pop(backbone_name)
        rope = values.pop("rope_parameters", None) or {}
        values["rope_theta"] = rope.pop("rope_theta", None)
        if "partial_rotary_factor" in rope:
            values["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
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


def _mask_of(config: FamilyConfig) -> int | None:
    """The mask token, for a family whose configs do not name it: that of the published vocabulary."""
    size = config.published_vocab_size
    is_published = config.vocab_size > config.published_mask_id if size is None else config.vocab_size == size
    return config.published_mask_id if config.mask_token_id is None and is_published else config.mask_token_id


def _stock(config: type) -> str:
    """Name of the backbone that a family's config is built on."""
    stock = next(base for base in config.__mro__ if base.__module__.startswith("transformers.models."))
    return stock.__name__.removesuffix("Config")


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
    own_names = {
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
    attribute_map = own_names
    dimensions = ("d_model", "n_heads", "n_layers", "vocab_size")
    backbone_options = {
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

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; the config of a LLaDA-MoE, which has the same `model_type`, if it has experts."""
        if config_dict.get("num_experts"):
            return LLaDAMoEConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs):
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


class ILLaDAConfig(FamilyConfig, LlamaConfig):
    """iLLaDA on a Llama backbone, under the backbone's names. Its config does not name the mask token."""

    model_type = "illada"
    published_mask_id = 5
    published_vocab_size = 155136
    published_stop_ids = ()
    backbone_options = {"layer_norm_eps": None}
    backbone_only = ("head_dim", "pretraining_tp")
    denoising = LLaDAConfig.denoising

    mask_token_id: int | None = None

    def _mask_token_id(self) -> int | None:
        return _mask_of(self)


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
        return _mask_of(self)


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


class LLaDA2MoeConfig(FamilyConfig, Glm4MoeConfig):
    """LLaDA 2.0 and 2.1 on a GLM-4-MoE backbone. Their published configs name neither the mask token nor the block size."""

    model_type = "llada2_moe"
    own_names = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}
    attribute_map = {**Glm4MoeConfig.attribute_map, **own_names}
    dimensions = (*DIMENSIONS, "num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")
    has_experts = True
    backbone_options = {
        "embedding_dropout": 0.0,
        "norm_head": False,
        "output_dropout": 0.0,
        "score_function": "sigmoid",
        "use_bias": False,
        "use_qkv_bias": False,
        "use_sliding_window": False,
    }
    backbone_only = ("attention_bias", "num_nextn_predict_layers")
    published_mask_id = 156895
    published_vocab_size = 157184
    published_stop_ids = (156892,)
    denoising = {"attention": "block", "block_size": 32, "block_origin": "sequence"}

    rms_norm_eps: float = 1e-6
    use_qk_norm: bool = True
    routed_scaling_factor: float = 2.5
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if kwargs.get("sliding_window") and not kwargs.get("use_sliding_window"):
            kwargs["sliding_window"] = None
        if not self.norm_topk_prob or self.num_experts_per_tok < 2:
            raise ValueError(
                f"This LLaDA2Moe config has `norm_topk_prob={self.norm_topk_prob}` and `num_experts_per_tok="
                f"{self.num_experts_per_tok}`: only the normalised weights of two or more experts can be loaded."
            )
        super().__post_init__(**kwargs)

    def spec_fields(self) -> dict[str, Any]:
        size = getattr(self, "block_size", None)
        return {**super().spec_fields(), **({} if size is None else {"block_size": size})}

    def _mask_token_id(self) -> int | None:
        return _mask_of(self)


class SDARMoeConfig(FamilyConfig, Qwen3MoeConfig):
    """SDAR with experts (30B-A3B) on a Qwen3-MoE backbone."""

    model_type = "sdar_moe"
    own_names = {"num_experts": "num_local_experts"}
    dimensions = (*DIMENSIONS, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    has_experts = True
    published_mask_id = SDARConfig.published_mask_id
    published_stop_ids = SDARConfig.published_stop_ids
    denoising = SDARConfig.denoising

    norm_topk_prob: bool = True
    block_size: int = 4
    mask_token_id: int | None = None

    def spec_fields(self) -> dict[str, Any]:
        return {**super().spec_fields(), "block_size": self.block_size}


class LLaDAMoEConfig(FamilyConfig, Qwen3MoeConfig):
    """
    LLaDA-MoE on a Qwen3-MoE backbone. Its `config.json` has the `model_type` of LLaDA, which knows it by its experts. It does
    not name the mask token.
    """

    model_type = "llada_moe"
    own_names = {
        "num_experts": "num_local_experts",
        "expert_intermediate_size": "moe_intermediate_size",
        "dense_intermediate_size": "intermediate_size",
    }
    attribute_map = {
        **Qwen3MoeConfig.attribute_map,
        "expert_intermediate_size": "moe_intermediate_size",
        "dense_intermediate_size": "intermediate_size",
    }
    dimensions = (
        *(name for name in DIMENSIONS if name != "intermediate_size"),
        *("num_experts", "num_experts_per_tok", "expert_intermediate_size"),
    )
    has_experts = True
    backbone_options = {
        "clip_qkv": None,
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "partial_rotary_factor": 1,
        "qk_layernorm": True,
        "routed_scaling_factor": 1,
        "shared_expert_intermediate_size": None,
    }
    backbone_only = ("decoder_sparse_step", "mlp_only_layers")
    published_mask_id = 156895
    published_vocab_size = 157184
    published_stop_ids = (156892,)
    denoising = LLaDAConfig.denoising

    norm_topk_prob: bool = False
    mask_token_id: int | None = None

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; the `model_type` of the file is that of another config here, and one entry may be `null`."""
        values = {name: value for name, value in config_dict.items() if name != "model_type"}
        if values.get("norm_topk_prob", False) is None:
            del values["norm_topk_prob"]
        return super().from_dict(values, **kwargs)

    def __post_init__(self, **kwargs):
        if self.norm_topk_prob:  # the published code does not look at it
            raise ValueError(
                "This LLaDA-MoE config has `norm_topk_prob=True`; only weights that are not normalised can be loaded."
            )
        if kwargs.get("dense_intermediate_size") is None:  # no layer is dense
            kwargs.pop("dense_intermediate_size", None)
        layers = kwargs.get("moe_layer_freq") or ()
        self.mlp_only_layers = [layer for layer, experts in enumerate(layers) if not experts]
        super().__post_init__(**kwargs)

    def _mask_token_id(self) -> int | None:
        return _mask_of(self)

    def to_json_string(self, use_diff: bool = True) -> str:
        values = json.loads(super().to_json_string(use_diff=use_diff))
        values["model_type"] = LLaDAConfig.model_type
        return json.dumps(values, indent=2, sort_keys=True) + "\n"
