"""What a checkpoint is: the facts about a diffusion policy that decoding and scoring need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from transformers import PretrainedConfig

from ..fields import AtLeast, check_fields, check_kind, check_names


CONFIG_KEY = "diffusion_spec"


@dataclass(frozen=True)
class DiffusionSpec:
    r"""
    How a policy denoises. It is stored in the model's config under `diffusion_spec` and saved with it.

    Args:
        mask_token_id (`int`):
            Id of the token that stands for a position that has not been unmasked yet.
        attention (`str`, *optional*, defaults to `"block"`):
            `"block"`: a position sees every position of its own block and of the blocks before it. `"full"`: every
            position sees every position, future blocks included (as masks).
        block_size (`int`, *optional*, defaults to `32`):
            Number of consecutive positions that are denoised together, in tokens.
        block_origin (`str`, *optional*, defaults to `"sequence"`):
            Where blocks are counted from. `"sequence"`: position 0 of the unpadded sequence, so the end of the prompt
            may share a block with the first response tokens. `"response"`: the first response token; the prompt is
            then one block of its own.
        token_shift (`bool`, *optional*, defaults to `False`):
            Whether the logits at position `i` predict the token at `i + 1` (`True`) or the one at `i` (`False`).
        first_token (`str`, *optional*, defaults to `"diffusion"`):
            How the first token of a block is made. `"diffusion"`: as any other. `"autoregressive"`: as a decoding step
            of its own, from the last position before the block, which is clean by then (needs `token_shift`, or
            `clean_attention="causal"`).
        stop_token_ids (`tuple[int, ...]`, *optional*, defaults to `()`):
            Tokens that end a response. The first one in a response is its last token.
        predicts_mask_token (`bool`, *optional*, defaults to `False`):
            Whether the mask token keeps its share of the softmax, as in the families' published samplers. `False` removes
            it from the softmax, in decoding and in scoring. The mask token is never sampled either way. With `True`,
            recorded and scored log-probabilities are therefore lower than those of the distribution that tokens are sampled
            from, by `-log(1 - p(mask))`. For a trained policy this is almost 0.
        absent_token_ids (`tuple[tuple[int, int], ...]`, *optional*):
            Ids that the tokenizer has no token for, although the model has rows for them: ranges `(first, end)`, `end`
            not included, in rising order. Vocabularies are padded to round numbers, and some tokenizers leave holes.
            These ids are removed from the softmax, in decoding and in scoring alike, so they are never sampled and never
            trained. `()`: there are none. `None`: unknown, and [`resolve_spec`] fills it from the tokenizer.
        predicts_visible_tokens (`bool`, *optional*, defaults to `False`):
            Whether the policy was trained to predict visible tokens too, some of which were wrong. What it predicts at a
            visible position then says how likely the token there is. Decoders that write over visible tokens need this.
        clean_attention (`str`, *optional*, defaults to `"block"`):
            What a position of the prompt or of a finished block sees, with block attention. `"block"`: as above, its own
            block and the blocks before it. `"causal"`: itself and the positions before it, as in a causal model. The block
            that is being denoised sees itself and everything before it either way.

    Raises:
        ValueError: if a field has a value that is not listed above, or two fields contradict each other.
    """

    mask_token_id: int
    attention: Literal["block", "full"] = "block"
    block_size: Annotated[int, AtLeast(1)] = 32
    block_origin: Literal["sequence", "response"] = "sequence"
    token_shift: bool = False
    first_token: Literal["diffusion", "autoregressive"] = "diffusion"
    stop_token_ids: tuple[int, ...] = ()
    predicts_mask_token: bool = False
    absent_token_ids: tuple[tuple[int, int], ...] | None = None
    predicts_visible_tokens: bool = False
    clean_attention: Literal["block", "causal"] = "block"

    def __post_init__(self):
        if type(self.mask_token_id) is not int or self.mask_token_id < 0:
            raise ValueError(f"`mask_token_id` must be a token id (a non-negative int), got {self.mask_token_id!r}.")
        check_fields(self)
        if self.first_token == "autoregressive" and not (self.token_shift or self.clean_attention == "causal"):
            raise ValueError(
                "`first_token='autoregressive'` reads the first token of a block from the position before it, which "
                "needs `token_shift=True` or `clean_attention='causal'`."
            )
        if self.attention == "full" and self.first_token == "autoregressive":
            raise ValueError("With full attention no position is clean before its block: use first_token='diffusion'.")
        if self.attention == "full" and self.clean_attention == "causal":
            raise ValueError(
                "With full attention no block is clean while others are denoised: use clean_attention='block', or "
                "attention='block'."
            )
        if self.attention == "block" and self.token_shift and self.first_token == "diffusion":
            raise ValueError(
                "With block attention and `token_shift=True` the first token of a block can only be read from the "
                "block before it: set `first_token='autoregressive'`."
            )
        stops = self.stop_token_ids
        if not isinstance(stops, list | tuple) or any(type(token) is not int for token in stops):
            raise ValueError(f"`stop_token_ids` must be a list of token ids, got {stops!r}.")
        if self.mask_token_id in stops:
            raise ValueError(f"`stop_token_ids` holds the mask token ({self.mask_token_id}).")
        object.__setattr__(self, "stop_token_ids", tuple(stops))
        self._check_absent()

    def _check_absent(self) -> None:
        ranges = self.absent_token_ids
        if ranges is None:
            return
        form = "`absent_token_ids` must be a list of ranges [first, end) of token ids, in rising order"
        if not isinstance(ranges, list | tuple):
            raise ValueError(f"{form}, got {ranges!r}.")
        after = 0
        for pair in ranges:
            if not isinstance(pair, list | tuple) or [type(token) for token in pair] != [int, int]:
                raise ValueError(f"{form}, got {ranges!r}.")
            if not after <= pair[0] < pair[1]:
                raise ValueError(f"{form}, got {ranges!r}.")
            after = pair[1]
        object.__setattr__(self, "absent_token_ids", tuple((first, end) for first, end in ranges))
        for name, token in self._named_tokens():
            if self.is_absent(token):
                raise ValueError(f"`absent_token_ids` holds {token}, which is in `{name}`.")

    def _named_tokens(self) -> list[tuple[str, int]]:
        """The tokens that fields name, each with the field."""
        return [("mask_token_id", self.mask_token_id), *(("stop_token_ids", token) for token in self.stop_token_ids)]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiffusionSpec:
        """Builds a spec from a mapping of field names to values. Raises a `ValueError` for unknown names, and without
        `mask_token_id`."""
        check_names("diffusion spec fields", values, cls)
        if "mask_token_id" not in values:
            raise ValueError("A diffusion spec needs `mask_token_id`, the id of the token that stands for [MASK].")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON types, without `absent_token_ids` if it is unknown."""
        values = {**asdict(self), "stop_token_ids": list(self.stop_token_ids)}
        for name in ("predicts_visible_tokens", "clean_attention"):  # a config that earlier versions can read
            if values[name] == getattr(type(self), name):
                del values[name]
        absent = values.pop("absent_token_ids")
        return values if absent is None else {**values, "absent_token_ids": [list(pair) for pair in absent]}

    def replace(self, **changes: Any) -> DiffusionSpec:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def is_absent(self, tokens):
        """Whether token ids are among `absent_token_ids` (int, or integer array or tensor)."""
        found = tokens != tokens
        for first, end in self.absent_token_ids or ():
            found = found | ((tokens >= first) & (tokens < end))
        return found

    # Where blocks are. Arguments are ints, NumPy arrays or integer tensors, and broadcast. Positions count from 0 at the first
    # token of the sequence without padding; block 0 holds the first response token.

    def prompt_tail(self, prompt_length):
        """Number of prompt tokens that share block 0 with the first response token."""
        return prompt_length % self.block_size if self.block_origin == "sequence" else prompt_length * 0

    def head(self, prompt_length):
        """Position of the first token of block 0."""
        return prompt_length - self.prompt_tail(prompt_length)

    def copied(self, head):
        """
        Of the `head` tokens before block 0, the number of those whose keys and values a response can copy from another one with the same
        prompt: none with full attention, and not the last token if the first one of block 0 may be read from it.
        """
        read = int(self.token_shift or self.first_token == "autoregressive")
        return max(head - read, 0) if self.attention == "block" else 0

    def block_of(self, position, prompt_length):
        """
        Block of a position. Blocks of the prompt are negative; with `block_origin="response"` the prompt is one block, -1.
        `head(prompt_length)` gives the same as `prompt_length`.
        """
        block = (position - self.head(prompt_length)) // self.block_size
        return block if self.block_origin == "sequence" else block - (block + 1) * (block < -1)

    def place_of(self, position, prompt_length):
        """Place of a position in its block, from 0 to `block_size - 1`."""
        return (position - self.head(prompt_length)) % self.block_size

    def block_start(self, block, prompt_length):
        """Position of the first token of a block."""
        return self.head(prompt_length) + block * self.block_size

    def rank(self, position, prompt_length, noisy):
        """
        Number that decides which token sees which with block attention. A clean token sees clean tokens of its own rank and of
        lower ranks. A noisy token sees clean tokens of lower ranks, and its own noisy copy. `noisy` (boolean): whether the
        position is in a noisy copy, or in the block that is being denoised.
        """
        if self.clean_attention == "block":
            return self.block_of(position, prompt_length)
        return position - noisy * self.place_of(position, prompt_length)

    def num_blocks(self, prompt_length, new_tokens):
        """Number of blocks that hold `new_tokens` tokens after the prompt."""
        return -(-(self.prompt_tail(prompt_length) + new_tokens) // self.block_size)

    def canvas_end(self, prompt_length, new_tokens):
        """Position after the last one of the canvas, which fills whole blocks."""
        return self.block_start(self.num_blocks(prompt_length, new_tokens), prompt_length)

    def writing_end(self, prompt_length, new_tokens: int):
        """
        Position after the last one that is unmasked: the end of the canvas, or that of `new_tokens` tokens, if these are less
        than a block. The rest of the canvas then stays masked, instead of being denoised for nothing.
        """
        whole = new_tokens >= self.block_size
        return self.canvas_end(prompt_length, new_tokens) if whole else prompt_length + new_tokens

    def longest_window(self, context: int) -> int:
        """The largest number of tokens, in whole blocks, that leaves at least one block of `context` positions for the tokens
        before them. At least 1."""
        return max((context // self.block_size - 1) * self.block_size, 1)

    def longest_prompt(self, context: int, new_tokens: int) -> int:
        """The largest length of a prompt with which the canvas ends within `context` positions. Less than 1 if there is no
        room."""
        whole = context if self.block_origin == "response" else context // self.block_size * self.block_size
        blocks = -(-new_tokens // self.block_size) * self.block_size
        return whole - (blocks if self.block_origin == "response" else new_tokens)


def sequence_blocks(positions, block_size: int):
    """Block of each position of a sequence, counted from position 0, without a distinction between prompt and response."""
    return positions // block_size


def family_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of [`DiffusionSpec`] that follow from the checkpoint's family; none for a stock backbone."""
    return config.spec_fields() if hasattr(config, "spec_fields") else {}


def spec_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of [`DiffusionSpec`] that a config knows: those of its family, overridden by those stored in it."""
    return {**family_fields(config), **(getattr(config, CONFIG_KEY, None) or {})}


def writes_left_to_right(fields: Mapping[str, Any]) -> bool:
    """Whether fields of [`DiffusionSpec`] say that tokens are written one after another, as causal models do."""
    return fields.get("block_size") == 1 and fields.get("first_token") == "autoregressive"


def get_spec(config: PretrainedConfig, overrides: Mapping[str, Any] | None = None) -> DiffusionSpec:
    """
    The spec of a model: stored in its config, or derived from its family.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Config of the policy.
        overrides (`Mapping[str, Any]`, *optional*):
            Fields that complete or replace what the config says.

    Raises:
        TypeError: if the config is something else, such as the model.
        ValueError: if nothing says which token is the mask, or what else differs between checkpoints of the family.
    """
    check_kind("config", config, PretrainedConfig, "the config of a model (model.config)")
    values = {**spec_fields(config), **(overrides or {})}
    if not values:
        raise ValueError(
            f"This `{config.model_type}` model has no diffusion spec: nothing says which token stands for [MASK] and "
            "how its blocks are denoised. Give it one before training, for example "
            "`set_spec(model.config, DiffusionSpec(mask_token_id=tokenizer.mask_token_id, block_size=32, "
            "stop_token_ids=(tokenizer.eos_token_id,)))`, or pass "
            "`DTRPOConfig(diffusion_spec={'mask_token_id': ..., 'block_size': ...})`."
        )
    if "mask_token_id" not in values:
        raise ValueError(
            f"The config of this `{config.model_type}` model does not say which token stands for [MASK]. Pass "
            "`DTRPOConfig(diffusion_spec={'mask_token_id': ...})`; `resolve_mask_token(model.config, tokenizer)` "
            "reads it from the tokenizer."
        )
    left_open = config.left_open(values) if hasattr(config, "left_open") else {}
    for what in left_open.values():
        raise ValueError(f"The config of this `{config.model_type}` model does not say {what}")
    return DiffusionSpec.from_dict(values)


def check_spec(spec: DiffusionSpec, config: PretrainedConfig) -> None:
    """Raises a `ValueError` if `spec` names tokens that the model of this config does not have."""
    vocab_size = config.get_text_config().vocab_size
    last = [("absent_token_ids", end - 1) for _, end in spec.absent_token_ids or ()]
    for name, token in [*spec._named_tokens(), *last]:
        if not 0 <= token < vocab_size:
            raise ValueError(f"`{name}` holds {token}, but the model's vocabulary has {vocab_size} tokens.")


def impossible_token(
    tokens: Sequence[int] | np.ndarray, spec: DiffusionSpec, vocab_size: int | None = None
) -> tuple[int, str] | None:
    """
    Looks for a token that no prompt and no response can hold: the mask token, one outside the model's vocabulary (of
    `vocab_size` tokens, if that is known), or one that the tokenizer does not have.

    Returns:
        The place of such a token and its description in words, or `None` if there is none.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    outside = (ids < 0) | (ids >= vocab_size) if vocab_size is not None else ids < 0
    for wrong, what in (
        (ids == spec.mask_token_id, "the mask token ({})"),
        (outside, f"token {{}}, but the model's vocabulary has {vocab_size} tokens"),
        (spec.is_absent(ids), "token {}, which the tokenizer does not have (`absent_token_ids` of the policy's spec)"),
    ):
        if wrong.any():
            place = int(wrong.argmax())
            return place, what.format(int(ids[place]))
    return None


def set_spec(config: PretrainedConfig, spec: DiffusionSpec) -> None:
    """Stores `spec` in `config`, from where it is saved and loaded with the model."""
    check_kind("config", config, PretrainedConfig, "the config of a model (model.config)")
    check_kind("spec", spec, DiffusionSpec, "a DiffusionSpec")
    check_spec(spec, config)
    setattr(config, CONFIG_KEY, spec.to_dict())
