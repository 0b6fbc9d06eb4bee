"""Every causal backbone of transformers gives the right numbers as a policy, or is refused by name."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import SPECS, make_policy
from tests.policies.backbones import BACKBONES, any_tiny_backbone, tiny_backbone
from trl_diffusion import DecodingConfig, DiffusionSpec, decode
from trl_diffusion.offline.orders import finished_batch, given_order
from trl_diffusion.policies.attention import PLANNED, enable_plans
from trl_diffusion.policies.limits import context_length
from trl_diffusion.policies.spec import family_fields
from trl_diffusion.policies.trial import try_policy
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score
from trl_diffusion.scoring.states import all_states
from trl_diffusion.trajectories.trajectory import TrajectoryBatch


MASK = 63
BLOCK = DiffusionSpec(mask_token_id=MASK, block_size=4, predicts_mask_token=True)
FULL = BLOCK.replace(attention="full", block_origin="response")
CLEAN = BLOCK.replace(clean_attention="causal")
CAUSAL = BLOCK.replace(block_size=1, token_shift=True, first_token="autoregressive")
PROMPTS = [[7, 8, 9, 30, 11], [20, 21, 22, 12, 24, 25, 26, 13, 28]]
NEW_TOKENS = 7

# With block and with full attention. A backbone that is in neither list must be right or refused all the same.
RIGHT = {
    *("arcee", "cohere", "ernie4_5", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode"),
    *(
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "granite",
        "helium",
        "llama",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
    ),
    *(
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
    ),
    *("seed_oss", "smollm3", "stablelm", "starcoder2", "xglm"),
}
REFUSED = {
    "bart",
    "bloom",
    "cpmant",
    "falcon_mamba",
    "mamba",
    "mamba2",
    "marian",
    "recurrent_gemma",
    "roberta",
    "rwkv",
    "xlnet",
}


def close(ours: torch.Tensor, right: torch.Tensor) -> None:
    """Equal but for rounding; log-probabilities of these policies are about -4."""
    torch.testing.assert_close(ours.double(), right.double(), atol=1e-3, rtol=1e-3)


def alone(model, spec: DiffusionSpec, batch: TrajectoryBatch) -> torch.Tensor:
    """
    The log-probability of every token in the state in which it was unmasked: one row of tokens, one eager forward pass under
    a mask that is written out.
    """
    model.set_attn_implementation("eager")
    found = torch.zeros_like(batch.logps)
    for row, prompt in enumerate(PROMPTS):
        start = len(prompt)
        canvas, steps = batch.canvas_ids[row].tolist(), batch.steps[row].tolist()
        blocks = torch.arange(start + len(canvas)) // spec.block_size
        if spec.block_origin == "response":
            blocks = (
                (torch.arange(start + len(canvas)) - start).div(spec.block_size, rounding_mode="floor").clamp(min=-1)
            )
        for column in range(int(batch.completion_lengths[row])):
            here = int(blocks[start + column])
            tokens = list(prompt)
            for other, token in enumerate(canvas):
                block = int(blocks[start + other])
                if spec.attention == "block" and block > here:
                    break
                visible = block < here or (block == here and 0 <= steps[other] < steps[column])
                tokens.append(token if visible else MASK)
            if spec.attention == "full":
                tokens = tokens[: start + int(batch.canvas_lengths[row])]
            length = len(tokens)
            allowed = (blocks[None, :length] <= blocks[:length, None]) | (spec.attention == "full")
            if spec.clean_attention == "causal":
                allowed = torch.ones(length, length).tril().bool() | (blocks[:length, None] == here)
            mask = torch.zeros(1, 1, length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)
            ids = torch.tensor([tokens])
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=torch.arange(length)[None], use_cache=False
            ).logits
            found[row, column] = logits[0, start + column].float().log_softmax(-1)[canvas[column]]
    return found


@torch.no_grad()
def from_left_to_right(model) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of a response: of a policy with blocks of one token, all states in a packed pass, and of the model as
    it was made, which is asked once, without a mask and without positions.
    """
    responses = [[30 + column + row for column in range(NEW_TOKENS)] for row in range(len(PROMPTS))]
    right = torch.stack(
        [
            model(input_ids=torch.tensor([prompt + response]), use_cache=False)
            .logits[0]
            .float()
            .log_softmax(-1)[range(len(prompt) - 1, len(prompt) + NEW_TOKENS - 1), response]
            for prompt, response in zip(PROMPTS, responses, strict=True)
        ]
    )
    batch = given_order(finished_batch(PROMPTS, responses, CAUSAL), CAUSAL, "left_to_right")
    try_policy(model, CAUSAL)
    enable_plans(model)
    ours, _ = score(model, pack(batch, CAUSAL, all_states(batch, CAUSAL)), CAUSAL)
    return ours, right


@torch.no_grad()
def check(model, spec: DiffusionSpec) -> None:
    """Recorded, packed and plain log-probabilities are the same."""
    settings = DecodingConfig(NEW_TOKENS, temperature=1.0, tokens_per_step=2)
    batch = decode(model, PROMPTS, settings, spec, seeds=[1, 2])
    enable_plans(model)
    packed, _ = score(model, pack(batch, spec, all_states(batch, spec), one_row=spec.attention == "block"), spec)
    counted = batch.completion_mask
    plain = alone(model, spec, batch)
    close(batch.logps[counted], plain[counted])
    close(packed[counted], plain[counted])


# Those of which it is not written down which they are, are left to `make test-long`.
EACH = [
    pytest.param(name, marks=() if name in RIGHT | REFUSED else pytest.mark.long)
    for name in ("qwen3", *(name for name in BACKBONES if name != "qwen3"))
]


@pytest.mark.parametrize("model_type", EACH)
def test_a_backbone_is_right_or_refused(model_type):
    model = any_tiny_backbone(model_type)
    if isinstance(model, str):
        if model_type in RIGHT | REFUSED:
            pytest.fail(model)
        pytest.skip(f"no tiny one: {model}")
    ways = [lambda model: check(model, BLOCK), lambda model: check(model, CLEAN), lambda model: check(model, FULL)]
    if not family_fields(model.config):  # a family does not run from left to right
        ways.append(lambda model: close(*from_left_to_right(model)))
    with warnings.catch_warnings(action="ignore"):
        for way in ways:
            try:
                way(copy.deepcopy(model))
            except ValueError as error:
                said = str(error)
                assert said.startswith(f"`{model.config.model_type}`") and "cannot be a diffusion policy" in said
                assert "\n" not in said and model_type not in RIGHT
            else:
                assert model_type not in REFUSED


def test_what_does_not_pass_plans_on_is_given_masks(caplog):
    """StableLM and Nemotron drop the arguments that their layers do not know; the others take the quick way."""
    for model_type, quick in (("qwen3", True), ("stablelm", False), ("nemotron", False)):
        model = tiny_backbone(model_type)
        caplog.clear()
        close(*from_left_to_right(model))
        assert (model.config._attn_implementation == PLANNED) == quick
        assert ("slower" in caplog.text and model_type in caplog.text) != quick
        check(tiny_backbone(model_type), BLOCK)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mpt", "a packed row gives logits"),  # ALiBi goes by the place in the row
        ("roformer", "a packed row gives logits"),
        ("roberta", "without either"),  # counts positions from its padding token on
        ("rwkv", "sees nothing of a later one"),
        ("mamba2", "layers of type 'linear_attention'"),
        ("bloom", "fails under an attention mask"),
    ],
)
def test_the_reason_is_named(model_type, reason):
    model = any_tiny_backbone(model_type)
    with pytest.raises(ValueError, match=rf"`{model_type}`.* cannot be a diffusion policy.*{reason}"):
        try_policy(model, BLOCK)
    with pytest.raises(ValueError, match=model_type):  # again, and by those who decode
        decode(model, PROMPTS, DecodingConfig(NEW_TOKENS), BLOCK)


def test_trying_leaves_no_trace():
    model = tiny_backbone("llama").train()
    model.model.layers[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    try_policy(model, BLOCK, training=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_policy_is_tried_once():
    model, passes = tiny_backbone("llama"), []
    model.register_forward_hook(lambda module, args, output: passes.append(output))
    try_policy(model, BLOCK)
    assert 0 < len(passes) <= 6
    count = len(passes)
    try_policy(model, BLOCK)
    assert len(passes) == count
    try_policy(model, FULL)
    assert count < len(passes) <= count + 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_reason(dtype):
    for model_type in ("qwen3", "qwen3_moe", "mixtral", "gemma3_text", "gpt2"):
        for spec in (BLOCK, FULL):
            try_policy(tiny_backbone(model_type).to(dtype), spec, training=model_type != "gpt2")
    with pytest.raises(ValueError, match="mpt"):
        try_policy(tiny_backbone("mpt").to(dtype), BLOCK)


def test_a_model_without_weights_is_not_tried():
    with torch.device("meta"):
        try_policy(AutoModelForCausalLM.from_config(tiny_backbone("rwkv").config), BLOCK)


def test_what_cannot_be_compared_is_no_reason():
    """Weights that are not finite are found elsewhere; a policy that is always sure of the same gives no differences."""
    for value in (float("nan"), 0.0):
        policy = make_policy(SPECS["full"])
        torch.nn.init.constant_(policy.lm_head.weight, value)
        try_policy(policy, SPECS["full"], training=True)


# ------------------------------------------------------------------------------------------------------------- windows


def test_the_context_is_the_shortest_window():
    assert context_length(tiny_backbone("qwen3").config) == (128, "max_position_embeddings")
    windowed = tiny_backbone("mistral", sliding_window=16).config
    assert context_length(windowed) == (16, "sliding_window")
    assert context_length(tiny_backbone("mistral", sliding_window=None).config)[0] == 128
    unused = tiny_backbone("qwen2", use_sliding_window=False, sliding_window=16).config
    assert context_length(unused)[0] == 128
    used = tiny_backbone("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1).config
    assert context_length(used) == (16, "sliding_window")
    assert context_length(tiny_backbone("gemma2", sliding_window=8).config) == (8, "sliding_window")
    assert context_length(tiny_backbone("llama4_text", attention_chunk_size=24).config) == (24, "attention_chunk_size")


def test_a_sequence_longer_than_a_window_is_refused():
    """A mask of ours would show what the window hides: the log-probabilities would be those of another model."""
    model = tiny_backbone("mistral", sliding_window=16)
    check(model, BLOCK)  # 9 + 7 tokens fill the window
    long = [list(range(7, 20))]
    with pytest.raises(
        ValueError, match=r"makes 20 positions, more than .* 16 \(`sliding_window`\).*`sliding_window: null`"
    ):
        decode(model, long, DecodingConfig(NEW_TOKENS), BLOCK)
    decode(tiny_backbone("mistral", sliding_window=None), long, DecodingConfig(NEW_TOKENS), BLOCK)
