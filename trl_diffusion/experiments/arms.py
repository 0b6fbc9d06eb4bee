"""Which policies are compared, and how each of them answers and learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..decoding.config import DecodingConfig
from ..policies.spec import DiffusionSpec


BLOCK = 4  # positions of a block
TOKENS_PER_PASS = 2  # while training by reinforcement
# The three least likely tokens are taken back. A rule that ranks does not go out of date as a policy becomes surer.
REVISION = {"revision": "confidence", "revision_threshold": 1.0, "revision_max": 3, "revision_limit": 6}


@dataclass(frozen=True)
class Twin:
    """
    A pretrained policy. All twins have the same backbone, and with the same seed the same initial weights, documents and order of
    documents.

    Attributes:
        attention (`str`, *optional*): `"block"` or `"full"`; `None` for the autoregressive twin.
        corruption (`float`): largest share of visible tokens that it is shown wrong while it is pretrained.
    """

    attention: Literal["block", "full"] | None = None
    corruption: float = 0.0

    def spec(self, tokenizer: Any, length: int) -> DiffusionSpec | None:
        """
        How it is denoised.

        Args:
            tokenizer: its tokenizer.
            length (`int`): tokens of an answer with its stop token, which a policy with full attention denoises as one block.
        """
        if self.attention is None:
            return None
        return DiffusionSpec(
            mask_token_id=tokenizer.mask_token_id,
            attention=self.attention,
            block_size=BLOCK if self.attention == "block" else length,
            block_origin="response",
            stop_token_ids=(tokenizer.eos_token_id,),
            predicts_visible_tokens=self.corruption > 0,
        )


TWINS = {
    "autoregressive": Twin(),
    "block": Twin("block"),
    "full": Twin("full"),
    "block_corrupted": Twin("block", 0.1),
    "full_corrupted": Twin("full", 0.1),
}


@dataclass(frozen=True)
class Arm:
    """
    A policy, and how it answers.

    Attributes:
        twin (`str`): the pretrained policy that it begins with, one of `TWINS`.
        decoding (`dict`): settings of [`DecodingConfig`], while it learns and when it is measured.
    """

    twin: str
    decoding: dict[str, Any] = field(default_factory=dict)

    @property
    def revises(self) -> bool:
        """Whether it takes tokens back while it learns."""
        return "revision" in self.decoding

    @property
    def is_causal(self) -> bool:
        """Whether this is the autoregressive twin."""
        return TWINS[self.twin].attention is None

    def schedule(self, length: int) -> dict[str, Any]:
        """
        Settings with which an answer is denoised while the policy is trained: `TOKENS_PER_PASS` positions of a block for each forward
        pass, with revision too, whose passes are shared between filling and revising.

        Args:
            length (`int`): tokens of an answer with its stop token.
        """
        if self.is_causal:
            return {}
        size = BLOCK if TWINS[self.twin].attention == "block" else length
        return {"steps_per_block": -(-size // TOKENS_PER_PASS)}

    def config(self, length: int, temperature: float, **settings: Any) -> DecodingConfig:
        """The settings of the denoising loop, with `settings` over those of the arm."""
        return DecodingConfig(length, temperature, **{**self.decoding, **settings})


ARMS = {
    "autoregressive": Arm("autoregressive"),
    "block": Arm("block"),
    "full": Arm("full"),
    "fixed order": Arm("full", {"strategy": "left_to_right"}),
    "full, corrupted": Arm("full_corrupted"),
    "full, revising": Arm("full_corrupted", REVISION),
    "fixed order, revising": Arm("full_corrupted", {"strategy": "left_to_right", **REVISION}),
    "block, revising": Arm("block_corrupted", REVISION),
}
