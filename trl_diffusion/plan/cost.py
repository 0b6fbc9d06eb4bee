"""How long rollouts and updates take by arithmetic: floating-point operations, and weights read from memory."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from ..policies.spec import DiffusionSpec
from .simulate import Footprint, Workload


@dataclass(frozen=True)
class Machine:
    """
    What a GPU keeps up for long.

    Attributes:
        flops (`float`): floating-point operations per second.
        bandwidth (`float`): bytes per second from its memory.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class RolloutCost:
    """
    Decoding `rollout_batch_size` responses at once.

    Attributes:
        passes (`int`): forward passes.
        flops (`int`): floating-point operations of all of them.
        weights (`int`): bytes of weights that each pass reads.
    """

    passes: int
    flops: int
    weights: int

    def seconds(self, machine: Machine) -> float:
        """Whichever is the slower of computing and reading."""
        return max(self.flops / machine.flops, self.passes * self.weights / machine.bandwidth)


def rollout_cost(
    config: PretrainedConfig,
    spec: DiffusionSpec,
    work: Workload,
    footprint: Footprint,
    answer_length: int | None = None,
) -> RolloutCost:
    """
    Counts what the decoding loop runs: with block attention each prompt once for all its responses, every step the active block, and
    each finished block once more, with the first step of the next; with full attention everything at every step. An autoregressive
    first token is a step of its own, which runs without its block.

    Args:
        config ([`~transformers.PretrainedConfig`]): config of the policy.
        spec ([`DiffusionSpec`]): facts about the policy.
        work ([`Workload`]): lengths, tokens per step, responses at once and to a prompt.
        footprint ([`Footprint`]): of the same policy.
        answer_length (`int`, *optional*): tokens after which responses stop. Defaults to all of `completion_length`.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    prompt, size = work.prompt_length, spec.block_size
    head = spec.head(prompt)
    blocks = spec.num_blocks(prompt, answer_length or work.completion_length)
    end, written = (find(prompt, work.completion_length) for find in (spec.canvas_end, spec.writing_end))
    passes = logits = tokens = pairs = first_keys = 0
    for block in range(blocks):
        start = max(spec.block_start(block, prompt), prompt)
        left, first = min(spec.block_start(block + 1, prompt), written) - start, True
        if (
            spec.first_token == "autoregressive" and spec.place_of(start, prompt) == 0
        ):  # from what is clean, without the block
            queries = size if block else head
            first_keys = first_keys or start
            passes, logits, tokens, pairs = passes + 1, logits + 1, tokens + queries, pairs + queries * start
            left, first = left - 1, False
        while left > 0:
            if spec.attention == "full":
                queries = keys = end
            else:
                queries = size + first * (size if block else head)
                keys = spec.block_start(block + 1, prompt)
            first_keys = first_keys or keys
            passes, logits, tokens, pairs = passes + 1, logits + left, tokens + queries, pairs + queries * keys
            left, first = left - work.tokens_per_step, False
    rows = work.rollout_batch_size
    copied = (rows - -(-rows // work.num_generations)) * spec.copied(
        head
    )  # tokens whose keys and values are another response's
    tokens, pairs, logits = rows * tokens - copied, rows * pairs - copied * first_keys, rows * logits
    flops = 2 * (footprint.linear + footprint.used_experts) * tokens + 2 * text.hidden_size * text.vocab_size * logits
    flops += 4 * text.num_hidden_layers * heads * head_size * pairs
    return RolloutCost(passes, flops, footprint.weights)
