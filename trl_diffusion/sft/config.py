"""Configuration of [`DiffusionSFTTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import SFTConfig

from ..fields import AtLeast, Within, check_at_least, check_fields, check_one_of, check_within
from ..names import knows_names
from ..trainer.options import NO_REMOTE_CODE, PolicyOptions, settle
from .masks import MaskConfig


_NO_LOGITS = "the loss reads the logits of masked tokens only, and not those of every position"
# Whole numbers, each with its smallest value. A row of one token has nothing to train.
_WHOLE = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "seed": 0,
    "max_length": 2,
}
# Options of SFTConfig that do not apply to a diffusion policy, and why.
_REFUSED = {
    "padding_free": "the rows of the forward pass hold noisy copies of blocks. Set `packing=True` to save padding",
    "pad_to_multiple_of": "the rows of the forward pass hold noisy copies of blocks, which have a length of their own",
    "label_smoothing_factor": _NO_LOGITS,
    "use_liger_kernel": "its fused loss is causal. Its layers are not tested here",
    "trust_remote_code": NO_REMOTE_CODE,
    "router_aux_loss_coef": "the load balance of the experts would also count the noisy copies in a packed row",
    "include_num_input_tokens_seen": "the rows of the forward pass hold noisy copies of blocks. `num_tokens` is logged",
    "pad_token": "padding is never seen by the policy",
}


def is_refused(name: str) -> bool:
    """Whether an option of SFTConfig does not apply to a diffusion policy."""
    return name in _REFUSED or name == "loss_type"


@knows_names
@dataclass
class DiffusionSFTConfig(PolicyOptions, SFTConfig):
    r"""
    Configuration class for the [`DiffusionSFTTrainer`].

    It has every parameter of [`~trl.SFTConfig`], with the same meaning, and the ones below. Parameters of
    [`~trl.SFTConfig`] that do not apply to a diffusion policy are refused (see [`DiffusionSFTConfig.refused`]). `bf16` defaults
    to `True` on a GPU that computes in bfloat16, and to `False` elsewhere. `dataloader_pin_memory` is `False` without a GPU.

    Parameters:
        > Parameters that control the policy

        diffusion_spec (`dict[str, Any]` or `str`, *optional*):
            Fields of [`DiffusionSpec`], as a mapping or a JSON string. They complete or override those in the model's config.
            A model whose config has no such fields becomes a policy with them.

        > Parameters that control the loss

        weighting (`str`, *optional*, defaults to `"elbo"`):
            `"elbo"`: the negative evidence lower bound of the trained tokens. `"mean"`: all masked tokens have the same weight
            (Fast-dLLM v2, SDAR). See [`~sft.masks.MaskConfig`].
        num_masks (`int`, *optional*, defaults to `1`):
            Number of random masks of a document in one step.
        complementary (`bool`, *optional*, defaults to `False`):
            With `weighting="mean"`: whether each mask is followed by its complement, so that every trained token is scored once.
        max_corruption (`float`, *optional*, defaults to `0.0`):
            With `weighting="mean"`: largest share of visible tokens that are replaced by other tokens of the document. For
            policies whose decoder will revise.
        canvas_length (`int`, *optional*):
            With full attention: smallest number of tokens in the canvas of a document that ends with a stop token. Further stop
            tokens fill the canvas, and are trained. A policy with full attention sees how long the canvas is. Set this to the
            number of new tokens that the policy will be asked for. Otherwise it learns that a response is as long as its canvas.
            By default, only the last block is filled.
        block_sizes (`list[int]`, *optional*):
            Block sizes of training, one after another, such as `[1, 2, 4]`. Each is used for the same number of steps. The last
            one is that of the policy, and each of the others divides it. Needs block attention.

    > [!NOTE]
    > All other defaults are those of the installed [`~trl.SFTConfig`].
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["diffusion_spec"]

    diffusion_spec: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Fields of `DiffusionSpec` (mask_token_id, attention, block_size, ...) that complete or override "
            "the ones stored in the model's config, as a mapping or a JSON string."
        },
    )
    weighting: str = field(
        default="elbo",
        metadata={
            "help": "'elbo': the negative evidence lower bound. 'mean': all masked tokens have the same weight.",
            "choices": ["elbo", "mean"],
        },
    )
    num_masks: Annotated[int, AtLeast(1)] = field(
        default=1, metadata={"help": "Number of random masks of a document in one step."}
    )
    complementary: bool = field(
        default=False, metadata={"help": "With weighting='mean': whether each mask is followed by its complement."}
    )
    max_corruption: Annotated[float, Within("[0, 1)")] = field(
        default=0.0,
        metadata={
            "help": "With weighting='mean': largest share of visible tokens that are replaced by other tokens of the document. "
            "For policies whose decoder will revise."
        },
    )
    canvas_length: Annotated[int, AtLeast(1)] | None = field(
        default=None,
        metadata={
            "help": "With full attention: smallest number of tokens in the canvas of a document that ends with a stop token. "
            "Further stop tokens fill it. Set it to the number of new tokens that the policy will be asked for."
        },
    )
    block_sizes: list[int] | None = field(
        default=None,
        metadata={
            "help": "Block sizes of training, one after another, each for the same number of steps. The last one is that of the "
            "policy."
        },
    )

    if TYPE_CHECKING:
        output_dir: str = "trainer_output"  # the directory that transformers uses for `None`

    def __post_init__(self):
        settle(self)
        if self.loss_type is None:  # some versions of TRL would choose a causal loss in chunks
            self.loss_type = "nll"
        super().__post_init__()
        self.check_refused(SFTConfig)
        check_fields(self, type(self).__dataclass_fields__.keys() - SFTConfig.__dataclass_fields__.keys())
        self._check_training()
        self.masks()  # checks the settings of the masks
        sizes = self.block_sizes
        if sizes is not None and (not sizes or min(sizes) < 1 or any(sizes[-1] % size for size in sizes)):
            raise ValueError(
                f"`block_sizes` must be whole numbers of at least 1 that divide the last one, got {sizes!r}."
            )

    def _check_training(self) -> None:
        """Checks options of SFTConfig with which nothing would be trained, documents would be cut silently, or an error would not
        name its cause."""
        for name, least in _WHOLE.items():
            if name != "max_length" or self.max_length is not None:
                check_at_least(name, getattr(self, name), least)
        check_within("learning_rate", self.learning_rate, "[0, inf)")
        if self.max_steps == 0:
            raise ValueError(
                "`max_steps=0` trains nothing. Set it to 1 or more, or to -1 to go by `num_train_epochs`."
            )
        if self.activation_offloading and (self.use_cpu or not torch.accelerator.is_available()):
            raise ValueError(
                "`activation_offloading=True` moves activations from a GPU to the memory of the computer, and there is no GPU. Leave "
                "it at False."
            )
        check_one_of("packing_strategy", self.packing_strategy, ("bfd", "bfd_split"))
        accelerator = cast(AcceleratorConfig, self.accelerator_config)  # transformers has parsed it
        if accelerator.dispatch_batches:
            raise ValueError(
                "`accelerator_config`: `dispatch_batches=True` cuts batches into rows, but a row may have several documents. Leave "
                "it out: each process then reads its own rows of a stream."
            )
        accelerator.dispatch_batches = False  # `None` stands for `True` if the dataset is a stream

    def masks(self) -> MaskConfig:
        """How documents are masked."""
        return MaskConfig(
            weighting=cast(Literal["elbo", "mean"], self.weighting),
            num_masks=self.num_masks,
            complementary=self.complementary,
            max_corruption=self.max_corruption,
        )

    def refused(self) -> dict[str, str]:
        """Options that are set although they do not apply to a diffusion policy, each with the reason."""
        found = self.set_in_spite_of(_REFUSED)
        if self.loss_type != "nll":
            found["loss_type"] = f"{self.loss_type!r} is causal; `weighting` chooses the loss of masked tokens"
        return found
