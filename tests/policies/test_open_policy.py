"""Opening a policy: with an adapter or rounded weights, and what is known to be wrong before the weights are loaded."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.conftest import SPECS, make_policy, shared
from trl_diffusion import DecodingConfig, decode, tiny_policy_path
from trl_diffusion.policies import loading
from trl_diffusion.policies.policy import Policy, open_policy


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights is an error."""

    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)


def test_a_tokenizer_is_of_the_revision_of_its_model(monkeypatch):
    monkeypatch.setattr(loading, "load_tokenizer", lambda path, **options: (path, options))
    options = {"revision": "v2", "cache_dir": "c", "subfolder": "later", "dtype": "auto"}
    assert loading.tokenizer_of("org/model", options) == ("org/model", {"revision": "v2", "cache_dir": "c"})


def test_the_embedded_policy():
    policy = open_policy(tiny_policy_path())
    assert isinstance(policy, Policy) and not policy.model.training and policy.device.type == "cpu"
    assert (policy.tokenizer.padding_side, policy.tokenizer.truncation_side) == ("left", "left")
    assert policy.spec.mask_token_id == policy.tokenizer.mask_token_id
    other = open_policy(
        tiny_policy_path(), dtype="bfloat16", attn_implementation="eager", diffusion_spec={"block_size": 4}
    )
    assert other.model.dtype == torch.bfloat16 and other.model.config._attn_implementation == "eager"
    assert other.spec == policy.spec.replace(block_size=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "No model was given"),
        ({"path": tiny_policy_path(), "attn_implementation": "flash_attention_2"}, "flash_attention_2"),
        ({"path": tiny_policy_path(), "diffusion_spec": {"block_size": 0}}, "`block_size` must be a whole number"),
        ({"path": tiny_policy_path(), "diffusion_spec": {"mask_token_id": 10**6}}, "`mask_token_id` holds 1000000"),
    ],
)
def test_wrong_options_are_found_before_weights_are_loaded(no_weights, options, message):
    with pytest.raises(ValueError, match=message):
        open_policy(**options)


def test_wrong_layers_are_found_before_weights_are_loaded(no_weights, tmp_path):
    make_policy(SPECS["full"]).config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["layer_types"] = ["linear_attention", "full_attention"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="it has layers of type 'linear_attention'"):
        open_policy(str(tmp_path), tokenizer=tiny_policy_path())


def test_a_wrong_adapter_is_found_before_weights_are_loaded(tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_path())
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"q_proj"', '"q_proj", "attn_out"'))

    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)
    with pytest.raises(ValueError, match=r"\['attn_out'\] match nothing"):
        open_policy(adapter=str(tmp_path))


def four_bits() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture
def llada() -> tuple[str, dict]:
    """A checkpoint with layers that are no multiple of 64 wide, and what it is opened with."""
    pytest.importorskip("bitsandbytes", reason="needs the extra `quantization`")
    options = {"dtype": "float32", "tokenizer": tiny_policy_path(), "diffusion_spec": {"block_size": 8}}
    return str(shared("fixtures", "llada")), options


def test_weights_of_four_bits():
    """The policy says what one says whose matrices were rounded here: runs of 64 to 16 levels, by their largest entry."""
    pytest.importorskip("bitsandbytes", reason="needs the extra `quantization`")
    from bitsandbytes.functional import get_4bit_type
    from bitsandbytes.nn import Linear4bit

    plain = open_policy(tiny_policy_path(), dtype="float32")
    rounded = open_policy(tiny_policy_path(), dtype="float32", quantization=four_bits())
    levels, ids = get_4bit_type("nf4", device="cpu"), torch.arange(6, 14)[None]
    names = [name for name, module in rounded.model.named_modules() if isinstance(module, Linear4bit)]
    assert names and rounded.device.type == "cpu"
    with torch.no_grad():
        exact, found = plain.model(ids).logits, rounded.model(ids).logits
        for name in names:
            weight = plain.model.get_submodule(name).weight
            runs = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % 64)).reshape(-1, 64)
            scale = runs.abs().amax(1, keepdim=True).clamp(min=1e-12)
            nearest = levels[(runs / scale)[..., None].sub(levels).abs().argmin(-1)] * scale
            weight.copy_(nearest.reshape(-1)[: weight.numel()].reshape(weight.shape))
        ours = plain.model(ids).logits
    assert (found - ours).abs().max() < (exact - ours).abs().max() / 100
    batch = decode(rounded.model, [[7, 8, 9]], DecodingConfig(8, tokens_per_step=2), rounded.spec)
    assert batch.logps[batch.completion_mask].isfinite().all()


def test_weights_that_a_processor_reads_wrongly(llada, monkeypatch):
    """Some versions of bitsandbytes read rows of 96 entries wrongly on a CPU with `avx512f`; here it is so on every one."""
    from bitsandbytes import functional

    read = functional.dequantize_4bit

    def misread(entries, state, *args, **options):
        found = read(entries, state, *args, **options)
        return found + 1e-3 if len(state.shape) == 2 and state.shape[1] % 64 else found

    monkeypatch.setattr(functional, "dequantize_4bit", misread)
    path, options = llada
    with pytest.raises(
        ValueError, match=r"where a row has 96 entries, which is no multiple of 64: .*\.down_proj\. Open"
    ):
        open_policy(path, quantization=four_bits(), **options)
    open_policy(tiny_policy_path(), quantization=four_bits(), dtype="float32")  # 128 and 256


def test_weights_of_eight_bits(llada):
    """Each row of a matrix is whole numbers up to 127, by its largest entry."""
    from bitsandbytes.nn import Linear8bitLt

    path, options = llada
    eight = BitsAndBytesConfig(load_in_8bit=True)
    with torch.no_grad():
        plain, rounded = open_policy(path, **options), open_policy(path, quantization=eight, **options)
        layers = {name: module for name, module in rounded.model.named_modules() if isinstance(module, Linear8bitLt)}
        assert layers
        for name, layer in layers.items():
            weight = plain.model.get_submodule(name).weight
            whole = weight / weight.abs().amax(1, keepdim=True) * 127
            assert layer.weight.dtype == torch.int8 and (layer.weight - whole).abs().max() < 0.6
    batch = decode(rounded.model, [[7, 8, 9]], DecodingConfig(8, tokens_per_step=2), rounded.spec)
    assert batch.logps[batch.completion_mask].isfinite().all()


def test_an_adapter_on_rounded_weights(tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the extra `quantization`")
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_path())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(tmp_path)
    rounded = open_policy(tiny_policy_path(), quantization=four_bits(), dtype="float32")
    adapted = open_policy(adapter=str(tmp_path), quantization=four_bits(), dtype="float32")
    assert isinstance(adapted.model, PeftModel) and not any(p.requires_grad for p in adapted.model.parameters())
    ids = AutoTokenizer.from_pretrained(tiny_policy_path())("sudoku 3102200002100320", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        below, alone = rounded.model(ids).logits, adapted.model(ids).logits
        with adapted.model.disable_adapter():
            same = adapted.model(ids).logits
    assert torch.equal(same, below) and not torch.allclose(alone, below, rtol=1e-2, atol=1e-2)
