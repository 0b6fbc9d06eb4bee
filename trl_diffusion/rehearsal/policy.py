"""What there is of a policy before its weights are loaded: config, tokenizer, spec, and whether they belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..plan.published import find_config
from ..policies.files import check_weights, policy_in
from ..policies.limits import check_layers
from ..policies.loading import load_tokenizer, resolve_spec
from ..policies.policy import adapter_config_of
from ..policies.spec import DiffusionSpec
from .findings import Findings


@dataclass
class Outline:
    """
    A policy without its weights. What could not be found is `None`.

    Attributes:
        path (`str`): where its weights are, or will be fetched from.
        config ([`~transformers.PretrainedConfig`], *optional*): its config.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): its tokenizer.
        spec ([`DiffusionSpec`], *optional*): facts about it.
        adapter (`PeftConfig`, *optional*): the config of the adapter that was named, if it was one.
    """

    path: str
    config: PretrainedConfig | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    spec: DiffusionSpec | None = None
    adapter: Any = None

    def parts(self) -> tuple[PreTrainedTokenizerBase, DiffusionSpec, PretrainedConfig]:
        """Tokenizer, spec and config of an outline that is whole."""
        assert self.tokenizer is not None and self.spec is not None and self.config is not None
        return self.tokenizer, self.spec, self.config

    @property
    def is_whole(self) -> bool:
        """Whether everything was found."""
        return None not in (self.config, self.tokenizer, self.spec)


def outline(
    findings: Findings,
    path: str,
    tokenizer: str | None = None,
    fields: Mapping[str, Any] | None = None,
    adapter: str | None = None,
    **source: Any,
) -> Outline:
    """
    Finds a policy, without its weights.

    Args:
        findings ([`Findings`]): where to note what is found.
        path (`str`): directory or hub id of the model, or of an adapter on one.
        tokenizer (`str`, *optional*): directory or hub id of the tokenizer, if it is elsewhere.
        fields (`Mapping[str, Any]`, *optional*): fields of [`DiffusionSpec`] that complete those of the model.
        adapter (`str`, *optional*): directory or hub id of an adapter, if `path` is not one.
        source (`dict`): `revision` of the model.
    """
    named = tokenizer or path
    if adapter is None and "an adapter" in policy_in(path):
        adapter = path
    found = Outline(path)
    with findings.part("policy"):
        if adapter is not None:
            found.adapter = adapter_config_of(adapter)
            found.path = found.adapter.base_model_name_or_path if adapter == path or not path else path
        config, is_read = find_config(found.path, **source)
        check_layers(config)
        found.config = config
        check_weights(found.path)
        findings.say("policy", f"{found.path}: {_weights(found.path, is_read)}")
    with findings.part("tokenizer"):
        found.tokenizer = load_tokenizer(named)
    complete_outline(findings, found, fields, is_own=tokenizer in (None, found.path))
    return found


def complete_outline(
    findings: Findings, found: Outline, fields: Mapping[str, Any] | None, is_own: bool = True
) -> None:
    """Resolves the spec of an outline, and checks that the tokenizer is that of the model. `is_own`: it is where the model is."""
    if found.config is None:
        return
    with findings.part("spec"):
        spec = found.spec = resolve_spec(found.config, fields, found.tokenizer)
        blocks = f"blocks of {spec.block_size} from the start of the {spec.block_origin}"
        findings.say(
            "spec",
            f"{spec.attention} attention, {blocks}, mask token {spec.mask_token_id}, stop tokens {list(spec.stop_token_ids)}",
        )
    if found.tokenizer is not None:
        with findings.part("tokenizer"):
            check_vocabulary(found.tokenizer, found.config, None if is_own else _own_tokenizer(found.path))
            findings.say("tokenizer", f"{len(found.tokenizer)} tokens, for a vocabulary of {_size(found.config)}")


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, own: PreTrainedTokenizerBase | None = None
) -> None:
    """
    Checks that a tokenizer can be that of a model.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer.
        config ([`~transformers.PretrainedConfig`]): config of the model.
        own (`PreTrainedTokenizerBase`, *optional*): the tokenizer that is beside the model, if this one is from elsewhere.

    Raises:
        ValueError: if it has other ids for tokens of `own`, or lacks most of the model's tokens. It may have more tokens than `own`.
    """
    vocabulary, size, name = tokenizer.get_vocab(), _size(config), tokenizer.name_or_path
    differing = [
        token for token, number in (own.get_vocab() if own else {}).items() if vocabulary.get(token) != number
    ]
    if own is not None and differing:
        raise ValueError(
            f"The tokenizer {name} ({len(vocabulary)} tokens) has another vocabulary than the one beside the policy "
            f"({len(own.get_vocab())} tokens): {len(differing)} differ, such as {min(differing)!r}. Leave "
            "`--tokenizer_name_or_path` out."
        )
    known = sum(1 for token in set(vocabulary.values()) if token < size)
    if 2 * known < size:
        raise ValueError(
            f"The tokenizer {name} has {known} tokens of a policy whose vocabulary has {size}: it is that of another model. Give the "
            "policy's own as `--tokenizer_name_or_path`."
        )


def _size(config: PretrainedConfig) -> int:
    return config.get_text_config().vocab_size


def _own_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model, if there is one on this machine."""
    directory = Path(path)
    is_here = any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    if not is_here and (
        directory.exists() or not isinstance(try_to_load_from_cache(path, "tokenizer_config.json"), str)
    ):
        return None
    return load_tokenizer(path)


def _weights(path: str, is_read: bool) -> str:
    """Where the weights are, in words."""
    if "a whole model" in policy_in(path):
        return "weights are here"
    if Path(path).is_dir():
        return "config only; the weights are still to be put there"
    cached = [try_to_load_from_cache(path, name) for name in ("model.safetensors", "model.safetensors.index.json")]
    if any(isinstance(one, str) for one in cached):
        return "weights are in the hub's cache"
    return "the weights will be fetched" + (
        "" if is_read else "; not even the config is here, so its sizes are those that the package knows"
    )
