"""
Greedy decoding gives the tokens of the families' published loops, on random checkpoints of other shapes than the fixtures.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import published
from trl_diffusion import DecodingConfig, decode, get_spec
from trl_diffusion.policies.families.configs import DreamConfig, Fast_dLLM_QwenConfig, LLaDAConfig, SDARConfig


MASK, STOPS = 90, (5, 6, 7)
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "mask_token_id": MASK,
    "eos_token_id": list(STOPS),
}
CONFIGS = {"llada": LLaDAConfig, "dream": DreamConfig, "fast_dllm_v2": Fast_dLLM_QwenConfig, "sdar": SDARConfig}


def make(family: str, seed: int, **changes):
    config = CONFIGS[family](**{**SHAPE, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def make_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return torch.randint(8, MASK, (length,), generator=generator).tolist()


def check(model, prompts: list[list[int]], config: DecodingConfig, loop, **spec_changes) -> None:
    """Our tokens for all prompts at once, two lanes, against the loop's for each."""
    spec = get_spec(model.config, spec_changes)
    ours = decode(model, prompts, config, spec, batch_size=2).completions()
    for prompt, tokens in zip(prompts, ours, strict=True):
        theirs = loop(torch.tensor([prompt]))[0, len(prompt) :].tolist()
        assert tokens == theirs[: len(tokens)]
        stops = spec.stop_token_ids if config.stop_token_ids is None else config.stop_token_ids
        ended = [place for place, token in enumerate(theirs) if token in stops]
        assert len(tokens) == min(ended[0] + 1 if ended else len(theirs), config.max_new_tokens)


@pytest.mark.parametrize(("block", "steps", "seed"), [(8, 8, 0), (8, 3, 1), (24, 24, 1)])
def test_llada(block, steps, seed):
    model = make("llada", seed, num_key_value_heads=6)
    prompts = [make_prompt(length, seed) for length in (3, 17, 10)]
    config = DecodingConfig(24, steps_per_block=steps, allow_mask_token=True, stop_token_ids=())
    check(model, prompts, config, lambda x: published.llada(model, x, 24, block, steps, MASK), block_size=block)


@pytest.mark.parametrize(
    ("alg", "steps", "top_k"),
    [("maskgit_plus", 20, None), ("entropy", 7, 50), ("topk_margin", 20, 50), ("maskgit_plus", 7, None)],
)
def test_dream(alg, steps, top_k):
    length = 20
    model = make("dream", 2, tie_word_embeddings=True)
    prompts = [make_prompt(size, 2) for size in (4, 11)]
    strategy = {"maskgit_plus": "confidence", "entropy": "entropy", "topk_margin": "margin"}[alg]
    config = DecodingConfig(
        length,
        strategy=strategy,
        steps_per_block=steps,
        schedule="linear",
        top_k=top_k,
        allow_mask_token=True,
        stop_token_ids=(),
        tempered_confidence=True,
    )
    check(
        model, prompts, config, lambda x: published.dream(model, x, length, steps, MASK, alg, top_k), block_size=length
    )


@pytest.mark.parametrize(("threshold", "seed"), [(1.0, 0), (0.3, 1)])
def test_fast_dllm_v2(threshold, seed):
    """Prompts that end inside the first block, at its end, and inside the second; with and without a stop token."""
    model = make("fast_dllm_v2", seed)
    for stop, lengths in ((-1, (20, 32)), (9, (45, 20))):
        prompts = [make_prompt(length, seed) for length in lengths]
        config = DecodingConfig(
            40,
            strategy="threshold",
            threshold=threshold,
            sub_block_size=8,
            stop_token_ids=() if stop < 0 else (stop,),
            stop_rule="token",
            tempered_confidence=True,
        )

        def loop(x, stop=stop):
            return published.fast_dllm_v2(model, x, 40, MASK, stop, threshold)

        spec = get_spec(model.config)
        ours = decode(model, prompts, config, spec, batch_size=2).completions()
        for prompt, tokens in zip(prompts, ours, strict=True):
            theirs = loop(torch.tensor([prompt]))[0, len(prompt) :].tolist()[:40]
            assert tokens == theirs


STRATEGIES = {
    "sequential": {"strategy": "left_to_right"},
    "low_confidence_static": {"strategy": "confidence"},
    "low_confidence_dynamic": {"strategy": "threshold", "threshold": 0.3},
    "entropy_bounded": {"strategy": "entropy_bound", "entropy_bound": 2.0},
}


@pytest.mark.parametrize(
    ("name", "block", "tokens"),
    [
        *(("sequential", 8, 2), ("low_confidence_static", 4, 1), ("low_confidence_static", 8, 2)),
        *(("low_confidence_dynamic", 4, 1), ("entropy_bounded", 8, 2)),
    ],
)
def test_sdar(name, block, tokens):
    model = make("sdar", 3, block_size=block, head_dim=16)
    prompts = [make_prompt(length, 3) for length in (1, 4, 10)]
    config = DecodingConfig(21, tokens_per_step=tokens, tempered_confidence=True, **STRATEGIES[name])
    threshold = config.entropy_bound if name == "entropy_bounded" else config.threshold
    taken = set()

    def loop(x):
        return published.sdar(model, x, 21, MASK, block, block // tokens, name, threshold, STOPS)

    check(model, prompts, config, loop)
    batch = decode(model, prompts, config, get_spec(model.config))
    for row in range(len(prompts)):
        taken |= set(torch.bincount(batch.steps[row][batch.steps[row] >= 0]).tolist())
    if name in ("low_confidence_dynamic", "entropy_bounded"):
        assert len(taken) > 1  # several at once, and not always


@pytest.mark.parametrize(("cache", "seed"), [("prefix", 0), ("dual", 1)])
def test_caches_of_fast_dllm(cache, seed):
    model = make("llada", seed, num_key_value_heads=2)
    prompts = [make_prompt(length, seed) for length in (3, 17)]
    spec = get_spec(model.config, {"block_size": 8, "stop_token_ids": ()})
    batch = decode(model, prompts, DecodingConfig(24, approximate_cache=cache), spec)
    assert batch.cache == cache
    for prompt, tokens in zip(prompts, batch.completions(), strict=True):
        theirs = published.cached_full_attention(model, torch.tensor([prompt]), 24, 8, MASK, dual=cache == "dual")
        assert tokens == theirs[0, len(prompt) :].tolist()
