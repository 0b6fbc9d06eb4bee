"""
Checkpoints that the tests write themselves, in the families' published names, against a transformer written out here: what
loading, computing and saving does must not come from the code that is tested.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import trl_diffusion  # noqa: F401  (registers the families)
from tests.closeness import ROUNDING, assert_close
from tests.conftest import make_prompts
from tests.reference import draw_everything_at, lay_out, plain_forward_logps, who_sees_whom
from trl_diffusion import (
    DecodingConfig,
    DTRPOConfig,
    DTRPOTrainer,
    collect,
    decode,
    get_spec,
    load_trajectories,
    set_spec,
    tiny_policy_path,
)
from trl_diffusion.policies.export import save_backbone
from trl_diffusion.policies.families.nemotron import NemotronLabsDiffusionConfig
from trl_diffusion.policies.loading import load_config, resolve_spec
from trl_diffusion.scoring.score import score
from trl_diffusion.trajectories.trajectory import token_states


VOCABULARY, MASK = 112, 1  # the embedded policy's tokenizer has about 100 tokens, and 1 is its mask token

LLADA_NAMES = {
    "embed": "model.transformer.wte", "norm": "model.transformer.ln_f", "head": "model.transformer.ff_out",
    "layer": "model.transformer.blocks.", "norm_1": "attn_norm", "norm_2": "ff_norm", "q": "q_proj", "k": "k_proj",
    "v": "v_proj", "o": "attn_out", "gate": "ff_proj", "up": "up_proj", "down": "ff_out",
}  # fmt: skip
QWEN_NAMES = {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "layer": "model.layers.",
    "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "q": "self_attn.q_proj",
    "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
NEMOTRON_NAMES = {
    part: name.replace("model.", "encoder.").replace("lm_head", "diffusion_head") for part, name in QWEN_NAMES.items()
}
YARN = {
    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16, "rope_theta": 1e6, "rope_type": "yarn",
}  # fmt: skip


@dataclass
class Family:
    """A checkpoint to be written."""

    model_type: str
    classes: dict[str, str]
    names: dict[str, str]
    layers: int
    heads: int
    key_heads: int
    head_size: int
    tied: bool
    theta: float
    eps: float
    block: int | None = None  # `None`: full attention
    sees_all: bool = False  # with blocks, in a pass without a mask
    yarn: dict | None = None
    bias: bool = False
    head_norm: bool = False
    own: dict = field(default_factory=dict)
    given: dict | None = None  # fields of the spec that the config does not say
    hidden: int = 48
    inner: int = 40

    def config(self) -> dict:
        module = "modeling_of_the_hub"
        common = {
            "model_type": self.model_type,
            "architectures": [self.classes.get("AutoModelForCausalLM", self.classes["AutoModel"])],
            "auto_map": {name: f"{module}.{value}" for name, value in self.classes.items()},
            "rms_norm_eps": self.eps, "eos_token_id": 2, "pad_token_id": 0,
            **({"rope_theta": self.theta} if self.yarn is None else {"rope_parameters": self.yarn}),
        }  # fmt: skip
        if self.model_type == "llada":
            return common | {
                "d_model": self.hidden, "mlp_hidden_size": self.inner, "n_layers": self.layers, "n_heads": self.heads,
                "n_kv_heads": self.key_heads, "weight_tying": self.tied, "embedding_size": VOCABULARY,
                "max_sequence_length": 96, "activation_type": "silu", "mask_token_id": MASK, "block_type": "llama",
                **self.own,
            }  # fmt: skip
        return common | {
            "hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.key_heads, "hidden_act": "silu",
            "tie_word_embeddings": self.tied, "vocab_size": VOCABULARY, "max_position_embeddings": 96,
            "sliding_window": None, **({"use_sliding_window": False} if self.yarn is None else {}), **self.own,
        }  # fmt: skip

    def weights(self) -> dict[str, Tensor]:
        """Random weights under the family's names."""
        generator = torch.Generator().manual_seed(self.layers)
        query, key = self.heads * self.head_size, self.key_heads * self.head_size
        shapes = {
            "q": (query, self.hidden), "k": (key, self.hidden), "v": (key, self.hidden), "o": (self.hidden, query),
            "gate": (self.inner, self.hidden), "up": (self.inner, self.hidden), "down": (self.hidden, self.inner),
            "norm_1": (self.hidden,), "norm_2": (self.hidden,),
        }  # fmt: skip
        if self.head_norm:
            shapes |= {"q_norm": (self.head_size,), "k_norm": (self.head_size,)}
        whole = {"embed": (VOCABULARY, self.hidden), "norm": (self.hidden,)}
        if not self.tied:
            whole["head"] = (VOCABULARY, self.hidden)
        found = {f"{self.names[part]}.weight": shape for part, shape in whole.items()}
        for layer in range(self.layers):
            prefix = f"{self.names['layer']}{layer}."
            found |= {f"{prefix}{self.names[part]}.weight": shape for part, shape in shapes.items()}
            if self.bias:
                found |= {f"{prefix}{self.names[part]}.bias": shapes[part][:1] for part in "qkv"}
        random = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in found.items()}
        return {
            name: 1 + value if value.dim() == 1 and "bias" not in name else value for name, value in random.items()
        }


FAMILIES = {
    "llada": Family(
        "llada", {"AutoModelForCausalLM": "LLaDAModelLM", "AutoModel": "LLaDAModelLM"}, LLADA_NAMES,
        layers=2, heads=4, key_heads=4, head_size=12, tied=False, theta=500000.0, eps=1e-5,
        own={"vocab_size": 109},  # fewer tokens than the embedding has rows
    ),
    "llada-tied-grouped": Family(
        "llada", {"AutoModelForCausalLM": "LLaDAModelLM", "AutoModel": "LLaDAModelLM"}, LLADA_NAMES,
        layers=5, heads=6, key_heads=2, head_size=8, tied=True, theta=10000.0, eps=1e-6,
        own={"vocab_size": VOCABULARY, "include_bias": False, "layer_norm_type": "rms"},
    ),
    "dream": Family(
        "Dream", {"AutoModel": "DreamModel"}, QWEN_NAMES, layers=4, heads=6, key_heads=3, head_size=8, tied=False,
        theta=1e6, eps=1e-6, bias=True, own={"mask_token_id": MASK},
    ),
    "dream-tied": Family(
        "Dream", {"AutoModel": "DreamModel"}, QWEN_NAMES, layers=1, heads=4, key_heads=1, head_size=12, tied=True,
        theta=1e4, eps=1e-5, bias=True, own={"mask_token_id": MASK},
    ),
    "fast": Family(
        "Fast_dLLM_Qwen",
        {"AutoModelForCausalLM": "Fast_dLLM_QwenForCausalLM", "AutoModel": "Fast_dLLM_QwenModel"}, QWEN_NAMES,
        layers=3, heads=4, key_heads=1, head_size=12, tied=True, theta=1e6, eps=1e-6, block=16, bias=True,
        own={"bd_size": 16},
    ),
    "sdar": Family(
        "sdar", {"AutoModelForCausalLM": "SDARForCausalLM", "AutoModel": "SDARModel"}, QWEN_NAMES, layers=4, heads=6,
        key_heads=3, head_size=10, tied=False, theta=1e6, eps=1e-6, block=8, head_norm=True,
        own={"block_size": 8, "mask_token_id": MASK, "head_dim": 10, "attention_bias": False},
    ),
    "sdar-tied": Family(
        "sdar", {"AutoModelForCausalLM": "SDARForCausalLM", "AutoModel": "SDARModel"}, QWEN_NAMES, layers=1, heads=4,
        key_heads=4, head_size=12, tied=True, theta=1e4, eps=1e-6, block=1, head_norm=True,
        own={"block_size": 1, "mask_token_id": MASK, "head_dim": 12, "attention_bias": False},
    ),
    "nemotron": Family(
        "nemotron_labs_diffusion", {"AutoModel": "NemotronLabsDiffusionModel"}, NEMOTRON_NAMES, layers=3, heads=6,
        key_heads=2, head_size=12, tied=False, theta=1e6, eps=1e-5, block=8, sees_all=True, yarn=YARN,
        own={
            "ar_loss_weight": 1.0, "attention_bias": False, "attention_dropout": 0.0, "block_size": 8, "bos_token_id": 1,
            "dlm_loss_weight": None, "dlm_paradigm": "bidirectional", "dp_varying_mask_ratio": False, "head_dim": 12,
            "initializer_range": 0.02, "mask_token_id": MASK, "mlp_bias": False, "use_cache": False,
        },
    ),
    "a2d-qwen3-mdlm": Family(
        "a2d-qwen3", {"AutoModel": "A2DQwen3LMHeadModel", "AutoModelForMaskedLM": "A2DQwen3LMHeadModel"}, QWEN_NAMES, layers=2,
        heads=4, key_heads=2, head_size=16, tied=True, theta=1e6, eps=1e-6, head_norm=True, own={"head_dim": 16},
        given={"attention": "full", "block_origin": "response"},
    ),
    "a2d-qwen2-bd3lm": Family(
        "a2d-qwen2", {"AutoModel": "A2DQwen2LMHeadModel", "AutoModelForMaskedLM": "A2DQwen2LMHeadModel"}, QWEN_NAMES, layers=3,
        heads=4, key_heads=2, head_size=12, tied=True, theta=1e6, eps=1e-6, bias=True, block=8, sees_all=True,
        given={"attention": "block", "block_size": 8},
    ),
}  # fmt: skip


def frequencies(family: Family) -> Tensor:
    """Of the rotations, (D / 2,): with YaRN the slow ones are those of positions that are divided by `factor`."""
    half, yarn = family.head_size // 2, family.yarn
    plain = family.theta ** (-torch.arange(half) / half)
    if yarn is None:
        return plain

    def pair_with(turns: float) -> float:  # the pair that turns so often within the original length
        length = yarn["original_max_position_embeddings"] / (2 * math.pi * turns)
        return half * math.log(length) / math.log(family.theta)

    low, high = max(math.floor(pair_with(yarn["beta_fast"])), 0), math.ceil(pair_with(yarn["beta_slow"]))
    slow = ((torch.arange(half) - low) / (min(high, family.head_size - 1) - low)).clamp(0, 1)
    return plain * (1 - slow) + plain / yarn["factor"] * slow


def written_out(family: Family, weights: dict[str, Tensor], ids: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Logits of one row of ids (N,), shape (N, V). `allowed` (N, N): who sees whom, by default as without a mask."""

    def weight(part: str, layer: int | None = None, kind: str = "weight") -> Tensor:
        prefix = "" if layer is None else f"{family.names['layer']}{layer}."
        return weights[f"{prefix}{family.names[part]}.{kind}"]

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + family.eps).sqrt() * scale

    def rotate(x: Tensor) -> Tensor:  # (H, N, D)
        half = family.head_size // 2
        angles = torch.arange(len(ids))[:, None] * frequencies(family)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    if allowed is None:
        blocks = torch.arange(len(ids)) // (len(ids) if family.sees_all else family.block or len(ids))
        allowed = blocks[None, :] <= blocks[:, None]
    sharpness = torch.ones(len(ids))
    if family.yarn is not None:  # queries of later positions are longer
        lengths = torch.arange(len(ids)) // family.yarn["original_max_position_embeddings"]
        sharpness = 1 + family.yarn["llama_4_scaling_beta"] * (1 + lengths).log()
    x = weight("embed")[ids]
    for layer in range(family.layers):
        y = norm(x, weight("norm_1", layer))
        q, k, v = (y @ weight(part, layer).T + (weight(part, layer, "bias") if family.bias else 0) for part in "qkv")
        q, k, v = (value.view(len(ids), -1, family.head_size).transpose(0, 1) for value in (q, k, v))
        if family.head_norm:
            q, k = norm(q, weight("q_norm", layer)), norm(k, weight("k_norm", layer))
        k, v = (value.repeat_interleave(family.heads // family.key_heads, 0) for value in (rotate(k), v))
        scores = (rotate(q) * sharpness[:, None]) @ k.transpose(1, 2) / family.head_size**0.5
        scores = scores.masked_fill(~allowed, -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ weight("o", layer).T
        y = norm(x, weight("norm_2", layer))
        gate = y @ weight("gate", layer).T
        x = x + (gate * gate.sigmoid() * (y @ weight("up", layer).T)) @ weight("down", layer).T
    return norm(x, weight("norm")) @ weight("embed" if family.tied else "head").T


@pytest.fixture(params=sorted(FAMILIES))
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def checkpoint(family, tmp_path, monkeypatch) -> Path:
    """The checkpoint with a tokenizer and with remote code that must not be run, and nobody there to be asked."""

    def ask(*args):
        raise AssertionError("transformers asked whether to trust remote code")

    monkeypatch.setattr("builtins.input", ask)
    return write(family, tmp_path / "published")


def write(family: Family, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    directory.mkdir()
    config = family.config() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(
        {name: value.to(dtype) for name, value in family.weights().items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    (directory / "modeling_of_the_hub.py").write_text("raise RuntimeError('remote code was run')\n")
    AutoTokenizer.from_pretrained(tiny_policy_path()).save_pretrained(directory)
    return directory


def stored(directory: Path) -> dict[str, Tensor]:
    return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


def some_ids(length: int = 37) -> Tensor:
    return torch.randint(3, 100, (length,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"trust_remote_code": False}, {"attn_implementation": "eager"}])
def test_logits_are_those_written_out(family, checkpoint, options):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **options).eval()
    ids = some_ids()
    expected = written_out(family, family.weights(), ids)
    assert_close(model(ids[None]).logits[0], expected)
    left = torch.tensor([[0] * 6 + [1] * len(ids)])
    padded = model(torch.cat([torch.zeros(1, 6, dtype=torch.long), ids[None]], 1), attention_mask=left).logits[0, 6:]
    assert_close(padded, expected)


@torch.no_grad()
def test_a_causal_clean_part(tmp_path):
    """
    Nemotron-Labs-Diffusion while it decodes: under the mask of its published training and decoding code, logits are those
    written out, and what decoding records is what a packed pass and plain passes give.
    """
    family = FAMILIES["nemotron"]
    policy = AutoModelForCausalLM.from_pretrained(write(family, tmp_path / "published")).eval()
    spec, ids = get_spec(policy.config), some_ids()
    allowed = torch.ones(len(ids), len(ids)).tril().bool()
    allowed[-family.block :] = True  # the block that is being denoised
    assert torch.equal(allowed, who_sees_whom(spec, len(ids) - family.block, len(ids)))
    expected = written_out(family, family.weights(), ids, allowed)
    assert_close(policy(ids[None], attention_mask=allowed[None, None]).logits[0], expected)

    batch = decode(
        policy, make_prompts((3, 13, 24, 29)), DecodingConfig(20, 1.0, tokens_per_step=2), seeds=[1, 2, 3, 4]
    )
    plain = plain_forward_logps(policy, spec, batch, 1.0)
    assert_close(batch.logps[batch.steps >= 0], plain[batch.steps >= 0])
    groups, states, *_ = token_states(spec, batch)
    for step in range(int(states.max()) + 1):
        layout = lay_out(batch, spec, draw_everything_at(step, batch, groups))
        scored = layout.weights > 0
        assert_close(score(policy, layout, spec)[0][scored], plain[scored])


@torch.no_grad()
def test_auto_model_gives_what_the_family_gives(family, checkpoint):
    model = AutoModel.from_pretrained(checkpoint).eval()
    assert type(model).__name__ == family.classes["AutoModel"]
    expected = written_out(family, family.weights(), some_ids())
    output = model(some_ids()[None])
    logits = output.logits[0] if "logits" in output else output[0][0] @ head_of(family).T
    assert_close(logits, expected)


def head_of(family: Family) -> Tensor:
    return family.weights()[f"{family.names['embed' if family.tied else 'head']}.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_size", ["5GB", "30KB"])
def test_what_was_written_is_written_again(family, tmp_path, dtype, shard_size):
    published = write(family, tmp_path / "published", dtype)
    model = AutoModelForCausalLM.from_pretrained(published, dtype="auto")
    assert model.dtype == dtype
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard_size)
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (shard_size == "30KB")
    before, after = stored(published), stored(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == dtype and torch.equal(after[name], before[name]) for name in before)
    old, new = (json.loads((path / "config.json").read_text()) for path in (published, tmp_path / "saved"))
    assert {name: new.get(name, "missing") for name in old} == old
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_path_is_all_that_the_trainer_needs(family, checkpoint, tmp_path, beta):
    """The policy, its reference, its tokenizer and its spec, from a directory as the hub has it."""
    trainer = DTRPOTrainer(
        model=str(checkpoint),
        reward_funcs=lambda completions, **kwargs: [float(sum(map(ord, text))) for text in completions],
        args=DTRPOConfig(
            str(tmp_path / "run"), per_device_train_batch_size=4, num_generations=4, max_completion_length=9, max_steps=1,
            learning_rate=1e-2, beta=beta, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
            logging_steps=1, diffusion_spec=family.given,
        ),
        train_dataset=Dataset.from_list([{"prompt": "sudoku 12"}, {"prompt": "countdown 3,4"}]),
    )  # fmt: skip
    assert trainer.model.config.model_type == family.model_type
    assert trainer.spec.mask_token_id == MASK
    assert trainer.spec.attention == ("full" if family.block is None else "block")
    assert family.block in (None, trainer.spec.block_size)
    assert (type(trainer.ref_model) is type(trainer.model)) == (beta > 0)
    trainer.train()
    assert trainer.state.log_history[0]["diffusion/recorded_gap/max"] < ROUNDING
    trainer.save_model(tmp_path / "trained")
    before, after = stored(checkpoint), stored(tmp_path / "trained")
    assert before.keys() == after.keys()
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert not same, same


@pytest.mark.parametrize("name", ["nemotron", "a2d-qwen3-mdlm", "a2d-qwen2-bd3lm"])
def test_an_adapter_learns_from_stored_answers(name, tmp_path):
    """Three updates against the reference, with gradient checkpointing. The first finds the log-probabilities that were recorded."""
    family, path = FAMILIES[name], write(FAMILIES[name], tmp_path / "published")
    policy = AutoModelForCausalLM.from_pretrained(path).eval()
    rows = Dataset.from_list([{"prompt": "sudoku 12"}, {"prompt": "countdown 3,4"}])

    def reward(completions, **kwargs):
        return [float(sum(map(ord, text))) for text in completions]

    collect(
        policy, AutoTokenizer.from_pretrained(path), rows, reward, tmp_path / "stored", DecodingConfig(9, 1.0), num_responses=4,
        seed=0, spec=get_spec(policy.config, {**(family.given or {}), "mask_token_id": MASK}), disable_tqdm=True,
    )  # fmt: skip
    trainer = DTRPOTrainer(
        model=str(path),
        args=DTRPOConfig(
            str(tmp_path / "run"), per_device_train_batch_size=4, num_generations=4, max_completion_length=9, max_steps=3,
            learning_rate=1e-2, beta=0.1, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
            logging_steps=1, diffusion_spec=family.given, gradient_checkpointing=True,
        ),
        train_dataset=load_trajectories(tmp_path / "stored"),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3 and logs[0]["diffusion/recorded_gap/max"] < ROUNDING and logs[0]["kl"] < 1e-6 < logs[2]["kl"]
    moved = {name: bool(p.any()) for name, p in trainer.model.named_parameters() if "lora_B" in name}
    assert moved and all(moved.values())


@torch.no_grad()
def test_nemotron_with_blocks_of_one_token_is_a_causal_model(tmp_path):
    """Its published autoregressive mode: transformers' own `generate` and the decoder give the tokens of the causal model."""
    family = FAMILIES["nemotron"]
    policy = AutoModelForCausalLM.from_pretrained(write(family, tmp_path / "published")).eval()
    set_spec(policy.config, get_spec(policy.config, {"block_size": 1}))
    ids = some_ids(11)
    for _ in range(9):
        logits = written_out(family, family.weights(), ids, torch.ones(len(ids), len(ids)).tril().bool())
        assert_close(policy(ids[None]).logits[0], logits)
        logits[:, MASK] = -torch.inf
        ids = torch.cat([ids, logits[-1:].argmax(1)])
    settings = {"max_new_tokens": 9, "do_sample": False, "suppress_tokens": [MASK], "eos_token_id": None}
    assert torch.equal(policy.generate(ids[None, :11], **settings)[0], ids)
    stops = get_spec(policy.config, {"stop_token_ids": ()})
    assert decode(policy, [ids[:11].tolist()], DecodingConfig(9, 0.0), stops).completions() == [ids[11:].tolist()]


@torch.no_grad()
def test_nemotron_as_its_plain_backbone(tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(write(FAMILIES["nemotron"], tmp_path / "published")).eval()
    save_backbone(policy, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert plain.config.model_type == "ministral3" and get_spec(plain.config) == get_spec(policy.config)
    ids = some_ids()[None]
    everyone = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    assert torch.equal(plain(ids, attention_mask=everyone).logits, policy(ids).logits)


def test_the_published_nemotron_stops_where_its_config_says():
    spec = get_spec(NemotronLabsDiffusionConfig(eos_token_id=11))
    assert (spec.mask_token_id, spec.stop_token_ids, spec.block_size) == (100, (11,), 32)


def test_a_nemotron_that_writes_from_left_to_right_is_refused(tmp_path):
    values = {**FAMILIES["nemotron"].config(), "dlm_paradigm": "autoregressive"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="dlm_paradigm='autoregressive'.*from left to right"):
        load_config(tmp_path)


def test_a_model_without_a_mask_token_is_refused(tmp_path):
    """DiffusionGemma is denoised from random tokens. transformers knows it from 5.11 on; it is refused before, too."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "diffusion_gemma", "canvas_length": 256}))
    with pytest.raises(ValueError, match="`diffusion_gemma` .*no mask token.*random tokens") as refusal:
        load_config(tmp_path)
    assert "\n" not in str(refusal.value)
    if "diffusion_gemma_text" in CONFIG_MAPPING:
        config = AutoConfig.for_model("diffusion_gemma_text")
        with pytest.raises(ValueError, match="`diffusion_gemma_text` .*no mask token"):
            resolve_spec(config, {"mask_token_id": 4})


def test_what_a_config_does_not_say_is_asked_for(tmp_path):
    """dllm's MDLM and BD3LM checkpoints have the same config: neither is taken for the other."""
    config = load_config(write(FAMILIES["a2d-qwen3-mdlm"], tmp_path / "published"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    with pytest.raises(
        ValueError, match="`a2d-qwen3` .* does not say .*MDLM or as BD3LM.*'attention': 'full'"
    ) as refusal:
        resolve_spec(config, tokenizer=tokenizer)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="does not say where its blocks .*'block_origin': 'response'"):
        resolve_spec(config, {"attention": "full"}, tokenizer)
    mdlm, bd3lm = (
        resolve_spec(config, given, tokenizer)
        for given in ({"attention": "full", "block_origin": "response"}, {"attention": "block"})
    )
    assert (mdlm.mask_token_id, mdlm.attention, mdlm.token_shift, mdlm.stop_token_ids) == (MASK, "full", False, (2,))
    assert (bd3lm.attention, bd3lm.block_size, bd3lm.block_origin) == ("block", 32, "sequence")


def test_the_familys_own_code_is_found_beside_what_is_saved(family, checkpoint, tmp_path):
    """It is never run here, and is what the family's own tools run."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "local")
    name = "modeling_of_the_hub.py"
    assert (tmp_path / "local" / name).read_text() == (checkpoint / name).read_text()
    model.config._name_or_path = "their-name/their-model"  # as when it was loaded from the hub
    model.save_pretrained(tmp_path / "hub")
    saved = json.loads((tmp_path / "hub" / "config.json").read_text())["auto_map"]
    assert saved == {key: f"their-name/their-model--{code}" for key, code in family.config()["auto_map"].items()}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", trust_remote_code=False)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == saved


@pytest.mark.parametrize("name", ["nemotron", "a2d-qwen3-mdlm"])
def test_an_adapter_reaches_every_layer_and_merges_into_the_published_names(name, tmp_path):
    peft = pytest.importorskip("peft")
    published = write(FAMILIES[name], tmp_path / "published")
    policy = AutoModelForCausalLM.from_pretrained(published)
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(policy, config).eval()
    reached = [part for part, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert len(reached) == 7 * FAMILIES[name].layers  # all but the head
    ids = some_ids()[None]
    expected = adapted(ids).logits
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    before, after = stored(published), stored(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[part], after[part]) for part in before) == len(reached)
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, expected, atol=1e-3, rtol=1e-4
    )
