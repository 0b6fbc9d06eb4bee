"""The policy that `train` and `sft` begin with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..policies.files import policy_in
from ..policies.loading import load_tokenizer
from ..policies.policy import open_adapter
from ..policies.tiny import resolve_embedded, tiny_policy_path
from ..utils import read_mapping, seeded


if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

    from ..sft.config import DiffusionSFTConfig
    from ..trainer.config import DTRPOConfig


class Start(Protocol):
    """The options of a command that say where its policy comes from."""

    tokenizer_name_or_path: str | None
    random_policy: str | None


def random_config(fields: str, tokenizer) -> PretrainedConfig:
    """The config of a randomly initialised policy for a tokenizer."""
    options = read_mapping(fields, "random_policy")
    return AutoConfig.for_model(
        options.pop("model_type", "qwen3"),
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{"tie_word_embeddings": True, **options},
    )


def random_policy(fields: str, tokenizer, directory: Path, seed: int) -> str:
    """Makes a small randomly initialised policy for a tokenizer, and saves it: a reference is loaded from there. The
    global random state is afterwards what it was before."""
    config = random_config(fields, tokenizer)
    state = PartialState()
    if state.is_main_process:
        with seeded(seed):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.generation_config = GenerationConfig.from_model_config(config)
        model.save_pretrained(directory)
    state.wait_for_everyone()
    return str(directory)


def new_adapter(model_args: ModelConfig) -> PeftConfig | None:
    """
    The new adapter that the options ask for. A single name of a layer stands for all layers of this name, as several names do. TRL
    makes a pattern of it, which matches whole names only.
    """
    found = get_peft_config(model_args)
    target = getattr(found, "target_modules", None)
    if isinstance(target, str) and target.isidentifier():
        setattr(found, "target_modules", {target})  # noqa: B010
    return found


def is_random(script_args: Start, model_args: ModelConfig) -> bool:
    """Whether the policy is one of random weights."""
    return bool(script_args.random_policy) and not model_args.model_name_or_path


def policy_path(model_args: ModelConfig) -> str:
    """The path or hub id of the policy, the embedded one by default."""
    return resolve_embedded(model_args.model_name_or_path or tiny_policy_path())


def find_tokenizer(script_args: Start, model_args: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that the options name, or that of the policy."""
    if is_random(script_args, model_args) and not script_args.tokenizer_name_or_path:
        raise ValueError("`--random_policy` needs `--tokenizer_name_or_path`.")
    return load_tokenizer(script_args.tokenizer_name_or_path or policy_path(model_args))


def loading_options(training_args: DTRPOConfig | DiffusionSFTConfig, model_args: ModelConfig) -> dict[str, Any]:
    """How the model is loaded."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **training_args.model_options(),
    }


def find_policy(script_args: Start, training_args: DTRPOConfig | DiffusionSFTConfig, model_args: ModelConfig):
    """The path of the model (made here if it is a random one), or an adapter to train further, and its tokenizer."""
    tokenizer = find_tokenizer(script_args, model_args)
    if is_random(script_args, model_args):
        directory = Path(training_args.output_dir) / "random_policy"
        return random_policy(str(script_args.random_policy), tokenizer, directory, training_args.seed), tokenizer
    path, options = policy_path(model_args), loading_options(training_args, model_args)
    if "an adapter" in policy_in(path):
        return open_adapter(path, training_args.device, get_quantization_config(model_args), **options), tokenizer
    training_args.model_init_kwargs = options
    return path, tokenizer
