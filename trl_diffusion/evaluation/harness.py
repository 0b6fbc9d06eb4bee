"""
The model for lm-evaluation-harness (`pip install 'trl-diffusion[eval]'`).

The harness knows a model once this module is imported. It finds no models of other packages by itself, so either start
it from here, with the same arguments and every task it has:

    python -m trl_diffusion.evaluation --model trl_diffusion --tasks gsm8k \\
        --model_args pretrained=MODEL,peft=ADAPTER,decoding=strategy:threshold+threshold:0.9

or start it as `lm_eval` with a task file that ships with this package, which imports this module:

    lm_eval --model trl_diffusion --model_args pretrained=MODEL --metadata data_dir=DATA --tasks DIRECTORY/gsm8k_local.yaml
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from torch import Tensor

from ..decoding.config import DecodingConfig
from ..fields import check_at_least, check_one_of
from ..policies.policy import Policy, open_policy
from ..policies.prompts import read_chat_template_kwargs
from ..seeds import derive_seed
from ..utils import processes, read_mapping
from .generate import Usage, cut, generate
from .likelihood import chain_likelihoods, elbo_likelihoods, is_autoregressive


try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError("lm-evaluation-harness is missing: pip install 'trl-diffusion[eval]'") from error


logger = logging.getLogger(__name__)

LIKELIHOODS = ("elbo", "left_to_right")
# Options of sampling that leave the distribution as it is.
_NEUTRAL = {"top_p": (None, 1, 1.0), "min_p": (None, 0, 0.0), "top_k": (None, 0, -1), "num_beams": (None, 1)}


@register_model("trl_diffusion")
class DiffusionLM(TemplateLM):
    """
    A diffusion policy for lm-evaluation-harness.

    Args:
        pretrained (`str`, *optional*): path or hub id of the model. Defaults to the one that the adapter was made for.
        peft (`str`, *optional*): path or hub id of an adapter. It is used as it is, not merged.
        decoding (`dict` or `str`, *optional*): settings of [`DecodingConfig`], as a mapping, as
            `name:value+name:value`, as JSON, or as the path of a JSON or YAML file. They win over what a task asks for;
            what is not set here follows the task (number of tokens, temperature) or is the default.
        likelihood (`str`, *optional*, defaults to `"elbo"`): what `loglikelihood` is. `"elbo"`: the evidence lower bound,
            block by block, with `num_draws` random masks. `"left_to_right"`: exact, for that order of decoding. For a
            policy with blocks of one token, the exact likelihood is always taken.
        num_draws (`int`, *optional*, defaults to `128`): random masks of the bound, for each continuation.
        check_greedy (`bool`, *optional*, defaults to `True`): whether `loglikelihood` with the bound also decodes each
            continuation greedily, to say whether that is what the policy would answer. Without it, the answer to this
            is always no.
        seed (`int`, *optional*, defaults to `0`): source of masks and, with a temperature, of answers.
        batch_size (`int` or `str`, *optional*, defaults to `1`): rows of a forward pass. `"auto"` stands for 32.
        max_batch_size (`int`, *optional*): most rows of a forward pass.
        max_gen_toks (`int`, *optional*, defaults to `256`): most tokens of an answer, for tasks that do not say.
        max_length (`int`, *optional*): most positions of prompt and answer together. Defaults to the model's context.
            Prompts that leave no room lose their beginning.
        diffusion_spec (`dict` or `str`, *optional*): fields of [`DiffusionSpec`] that complete those of the model.
        chat_template_kwargs (`dict` or `str`, *optional*): variables of the chat template, written like `decoding`, such as
            `enable_thinking:false`. For `--apply_chat_template`.
        policy ([`Policy`], *optional*): an open policy, instead of the arguments that say where it is and how it is spoken to.
        tokenizer, revision, dtype, device, attn_implementation: see [`open_policy`].

    Attributes:
        usage ([`Usage`]): what answers have cost so far, on this process.

    With `accelerate launch`, every process answers its share of each task.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str | None = None,
        peft: str | None = None,
        decoding: str | Mapping[str, Any] | None = None,
        likelihood: str = "elbo",
        num_draws: int = 128,
        check_greedy: bool = True,
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        max_length: int | None = None,
        diffusion_spec: str | Mapping[str, Any] | None = None,
        chat_template_kwargs: str | Mapping[str, Any] | None = None,
        policy: Policy | None = None,
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        attn_implementation: str | None = None,
    ):
        super().__init__()
        check_one_of("likelihood", likelihood, LIKELIHOODS)
        check_at_least("num_draws", num_draws)
        self.decoding = read_mapping(decoding, "decoding")
        DecodingConfig.from_dict(self.decoding)
        self.batch_size = self._batch_size(batch_size, max_batch_size)
        state = processes()
        self._rank, self._world_size = state.process_index, state.num_processes
        if policy is None:
            policy = open_policy(
                pretrained,
                peft,
                tokenizer,
                revision=revision,
                dtype=dtype,
                device=self._place(device, state),
                attn_implementation=attn_implementation,
                diffusion_spec=read_mapping(diffusion_spec, "diffusion_spec"),
                chat_template_kwargs=read_chat_template_kwargs(chat_template_kwargs),
            )
        self.policy, self.tokenizer, self._device = policy, policy.tokenizer, policy.device
        self.likelihood = "left_to_right" if is_autoregressive(policy.spec) else likelihood
        self.num_draws, self.check_greedy, self.seed = num_draws, check_greedy, seed
        self.max_gen_toks = max_gen_toks
        self.max_length = max_length or policy.context or 2**31
        self.usage = Usage()

    @staticmethod
    def _batch_size(batch_size: int | str, largest: int | None) -> int:
        size = 32 if str(batch_size).startswith("auto") else int(batch_size)
        size = min(size, int(largest)) if largest else size
        check_at_least("batch_size", size)
        return size

    @staticmethod
    def _place(device: str | None, state: PartialState) -> torch.device | str:
        """Where the model goes. The harness asks for `cuda:0` if nobody says anything."""
        if state.num_processes > 1 or device is None:
            return state.device
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            logger.warning(f"There is no {device} here: the policy runs on the {state.device.type}.")
            return state.device
        return device

    # ------------------------------------------------------------------------------------------------ tokens

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text: the tokenizer's, or the first that stops the policy."""
        if self.tokenizer.eos_token_id is not None:
            return self.tokenizer.eos_token_id
        if self.policy.spec.stop_token_ids:
            return self.policy.spec.stop_token_ids[0]
        raise ValueError("Neither the tokenizer nor the policy's spec has a token that ends a text.")

    @property
    def prefix_token_id(self) -> int:
        """Token that stands before a text without a context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; with the tokenizer's own special tokens, unless they are there already."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer(text=string, add_special_tokens=add_special_tokens)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self.policy.chat_template_kwargs,
        )
        return cast(str, text)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer and of how conversations are written, for the harness's cache of requests."""
        template = self.policy.chat_template_kwargs
        options = f"-{json.dumps(template, sort_keys=True)}" if template else ""
        return f"{self.tokenizer.name_or_path}{options}".replace("/", "__")

    # ------------------------------------------------------------------------------------------------ answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to the first of its stop strings."""
        groups: dict[str, list[int]] = {}
        options = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        for row, option in enumerate(options):
            groups.setdefault(json.dumps(option, sort_keys=True, default=str), []).append(row)
        seeds = self._answer_seeds(requests)
        answers = [""] * len(requests)
        for rows in groups.values():
            option = options[rows[0]]
            settings = self._settings(option)
            prompts = [self.tok_encode(requests[row].args[0]) for row in rows]
            prompts = self.policy.fit(prompts, settings.max_new_tokens, self.max_length)
            completions, usage = generate(
                self.policy,
                prompts,
                settings,
                [seeds[row] for row in rows],
                self.batch_size,
                None if disable_tqdm or self.rank else "trl_diffusion",
            )
            self.usage.add(usage)
            for row, text in zip(rows, self.policy.decode(completions), strict=True):
                answers[row] = cut(text, option["until"])
                self.cache_hook.add_partial("generate_until", requests[row].args, answers[row])
        return answers

    def _settings(self, option: Mapping[str, Any]) -> DecodingConfig:
        """Settings of the decoder for a task's `generation_kwargs`; those of `decoding` win."""
        option = dict(option)
        sampled = option.pop("do_sample", False)
        settings: dict[str, Any] = {"max_new_tokens": option.pop("max_gen_toks")}
        option.pop("until", None)
        temperature = float(option.pop("temperature", 0.0) or 0.0)
        settings["temperature"] = temperature if sampled else 0.0
        for name, value in option.items():
            if value in _NEUTRAL.get(name, ()) or (name in _NEUTRAL and not sampled):
                continue
            if name not in (known := sorted(setting.name for setting in fields(DecodingConfig))):
                raise ValueError(
                    f"The task asks for `{name}={value!r}`, which the decoder does not have; its settings are {known}. "
                    "Override it with --gen_kwargs."
                )
            settings[name] = value
        return DecodingConfig(**{**settings, **self.decoding})

    def _answer_seeds(self, requests: list[Instance]) -> list[int]:
        """A seed for each answer, the same however many processes share the work: from its question and repetition."""
        seen: Counter = Counter()
        seeds = []
        for place, request in enumerate(requests):
            key = (request.task_name, place if request.doc_id is None else request.doc_id, request.idx)
            seeds.append(derive_seed(self.seed, key[1], request.idx, seen[key]))
            seen[key] += 1
        return seeds

    # ------------------------------------------------------------------------------------------- likelihoods

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        prompts = []
        for _, context, continuation in requests:
            prompts += self.policy.fit([context], max(len(continuation), 1), self.max_length)
        continuations = [continuation for _, _, continuation in requests]
        if self.likelihood == "left_to_right":
            found = chain_likelihoods(self.policy, prompts, continuations, self.batch_size)
            results = [(one.value, one.is_greedy) for one in found]
        else:
            values = elbo_likelihoods(self.policy, prompts, continuations, self.num_draws, self.seed, self.batch_size)
            greedy = self._are_greedy(prompts, continuations) if self.check_greedy else [False] * len(values)
            results = list(zip(values, greedy, strict=True))
        for (texts, *_), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def _are_greedy(self, prompts: list[list[int]], continuations: list[list[int]]) -> list[bool]:
        """Whether the policy, decoding greedily with the settings at hand, writes these continuations."""
        by_length: dict[int, list[int]] = {}
        for row, continuation in enumerate(continuations):
            by_length.setdefault(len(continuation), []).append(row)
        greedy = [True] * len(prompts)
        for length, rows in by_length.items():
            if length == 0:
                continue
            settings = DecodingConfig(**{**self.decoding, "max_new_tokens": length, "temperature": 0.0})
            answers, usage = generate(self.policy, [prompts[row] for row in rows], settings, None, self.batch_size)
            self.usage.add(usage)
            for row, answer in zip(rows, answers, strict=True):
                greedy[row] = answer == continuations[row]
        return greedy

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, window by window where they are longer than the context."""
        window = self.policy.spec.longest_window(self.max_length)
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, window, context_len=1)
            pieces = [(None, *make_disjoint_window(piece)) for piece in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(pieces)) if pieces else 0.0)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    # --------------------------------------------------------------------------------------------- processes

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The values of all processes, one after another."""
        return gather(tensor) if self.world_size > 1 else tensor

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes, on process `dst`; `None` elsewhere."""
        found = gather_object([obj]) if self.world_size > 1 else [obj]
        return found if self.rank == dst else None

    def barrier(self) -> None:
        """Waits for all processes."""
        processes().wait_for_everyone()

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        return {
            "diffusion_spec": self.policy.spec.to_dict(),
            "decoding": self.decoding,
            "chat_template_kwargs": self.policy.chat_template_kwargs,
            "likelihood": self.likelihood,
            "num_draws": self.num_draws if self.likelihood == "elbo" else None,
            "tokens_per_forward": self.usage.tokens_per_forward,
            "tokens_per_second": self.usage.tokens_per_second,
        }
