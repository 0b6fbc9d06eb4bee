"""What a request asks for: its fields, checked."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from ..decoding.config import DecodingConfig
from ..decoding.decode import check_prompts
from ..fields import is_number, nearest
from ..policies.forward import unwrap
from ..policies.policy import Policy
from ..seeds import derive_seed
from .errors import ApiError, refused


NO_LIKELIHOOD = (
    "a diffusion policy does not write from left to right, so it has no log-probability of a prompt or of a given "
    "continuation. Ask for a text to be generated."
)
ONE_CALL = "ask for `return_denoising`, whose log-probabilities come with the last event."
MOST_STOPS = 16


@dataclass(frozen=True)
class Limits:
    """
    What a server accepts.

    Attributes:
        new_tokens (`int`): most tokens of a response, and how many there are if a request does not say.
        prompt_tokens (`int`): most tokens of a prompt.
        responses (`int`): most responses of a request.
        body_bytes (`int`): most bytes of a request.
        body_seconds (`float`): longest time in which it may arrive.
    """

    new_tokens: int
    prompt_tokens: int
    responses: int
    body_bytes: int = 4_000_000
    body_seconds: float = 30.0


class Wish(NamedTuple):
    """One response of a request: token ids of its prompt, and its seed."""

    prompt: list[int]
    seed: int


@dataclass(frozen=True)
class Asked:
    """A request, checked. `config` holds the settings of its responses; `max_new_tokens` is in `new_tokens`."""

    chat: bool
    wishes: list[Wish]
    prompt_tokens: int  # of all prompts
    config: DecodingConfig
    new_tokens: int
    stop: list[str]
    stream: bool
    usage: bool  # whether a stream ends with the number of tokens
    logprobs: bool
    denoising: bool
    canvas: bool


# Fields that change nothing with these values, and are refused with others. Every field may be null.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "echo": ((False,), NO_LIKELIHOOD),
    "prompt_logprobs": ((), NO_LIKELIHOOD),
    "suffix": (("",), "the policy writes after a prompt. Leave it out."),
    "best_of": ((1,), "use `n`, and choose yourself."),
    "presence_penalty": ((0,), "there are no penalties here. Leave it out."),
    "frequency_penalty": ((0,), "there are no penalties here. Leave it out."),
    "logit_bias": (({},), "there is no bias here. Leave it out."),
    "top_logprobs": ((0,), "the log-probabilities of other tokens are not recorded. Leave it out."),
    "tools": (([],), "there are no tools here. Leave it out."),
    "tool_choice": (("none", "auto"), "there are no tools here. Leave it out."),
    "functions": (([],), "there are no functions here. Leave it out."),
    "response_format": (({"type": "text"},), "there is no other format than text. Leave it out."),
}
IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")
READ = (
    "model", "max_tokens", "temperature", "top_p", "n", "seed", "stop", "stream", "stream_options", "logprobs",
    "return_denoising", "stream_canvas",
)  # fmt: skip
OF_CHAT, OF_COMPLETIONS = ("messages", "max_completion_tokens"), ("prompt",)


def read_request(
    body: dict[str, Any], chat: bool, names: list[str], policy: Policy, config: DecodingConfig, limits: Limits
) -> Asked:
    """
    Checks a request. It takes time to tokenize, so this is not for the thread of the event loop.

    Args:
        body (`dict`): its JSON object.
        chat (`bool`): whether it is a chat completion.
        names (`list[str]`): what the policy is called.
        policy ([`Policy`]): the policy.
        config ([`DecodingConfig`]): settings, unless the request says otherwise.
        limits ([`Limits`]): what is accepted.

    Raises:
        ApiError: naming the field.
    """
    _check_names(body, (*READ, *(OF_CHAT if chat else OF_COMPLETIONS)))
    model = body.get("model")
    if model is not None and model not in names:
        raise ApiError(
            404, f"There is no model {model!r:.200} here; there is {names[0]!r}.", "model", "model_not_found"
        )
    number = _whole(body, "n", 1, 1, limits.responses)
    new_tokens = _new_tokens(body, chat, limits)
    stream, canvas = _flag(body, "stream"), _flag(body, "stream_canvas")
    logprobs = _logprobs(body, chat)
    if canvas and not stream:
        raise refused("stream_canvas", "is for streams. Set `stream` to true, too.")
    if logprobs and stream:
        raise refused("logprobs", f"is not for streams here: {ONE_CALL}")
    stop, denoising = _stop(body), _flag(body, "return_denoising")
    if stop and (denoising or canvas):
        raise refused("stop", "cuts the text, and the denoising is that of the whole response. Leave one of them out.")
    prompts = _conversation(body, policy) if chat else _prompts(body, policy, limits)
    if len(prompts) * number > limits.responses:
        raise refused(
            "n", f"{len(prompts)} prompts with {number} responses each are more than {limits.responses} responses."
        )
    try:
        check_prompts(prompts, policy.spec, unwrap(policy.model).config, new_tokens)
    except ValueError as error:
        raise refused("messages" if chat else "prompt", str(error)) from error
    longest = max(map(len, prompts))
    if longest > limits.prompt_tokens:
        raise refused(
            "messages" if chat else "prompt",
            f"a prompt has {longest} tokens, more than the {limits.prompt_tokens} that this server takes.",
            "context_length_exceeded",
        )
    options = _mapping(body, "stream_options", ("include_usage",))
    return Asked(
        chat=chat,
        wishes=_wishes(body, prompts, number),
        prompt_tokens=sum(map(len, prompts)),
        config=_config(body, config),
        new_tokens=new_tokens,
        stop=stop,
        stream=stream,
        usage=_flag(options, "include_usage"),
        logprobs=logprobs,
        denoising=denoising,
        canvas=canvas,
    )


# --------------------------------------------------------------------------------------------------------------- fields


def _check_names(body: dict[str, Any], known: tuple[str, ...]) -> None:
    for name, value in body.items():
        if name in NEUTRAL:
            neutral, why = NEUTRAL[name]
            if value is not None and value not in neutral:
                raise refused(name, why)
        elif name not in (*known, *IGNORED):
            near = nearest(name, known)
            hint = f" Is it meant to be {' or '.join(near)}?" if near else ""
            raise ApiError(400, f"There is no field {name!r:.200}; there are {sorted(known)}.{hint}", name[:200])


def _whole(body: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        raise refused(name, f"must be a whole number from {least} to {most}, got {value!r:.80}.")
    return value


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and type(value) is not bool:
        raise refused(name, f"must be true or false, got {value!r:.80}.")
    return bool(value)


def _mapping(body: dict[str, Any], name: str, known: tuple[str, ...]) -> dict[str, Any]:
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict) or set(value) - set(known):
        raise refused(name, f"must be an object with {' and '.join(known)}, got {value!r:.80}.")
    return value


def _new_tokens(body: dict[str, Any], chat: bool, limits: Limits) -> int:
    given = [name for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    if len(given) == 2 and body["max_tokens"] != body["max_completion_tokens"]:
        raise refused("max_tokens", "contradicts `max_completion_tokens`. Give one of them.")
    name = given[0] if given else "max_tokens"
    return _whole(body, name, limits.new_tokens, 1, limits.new_tokens)


def _logprobs(body: dict[str, Any], chat: bool) -> bool:
    if chat:
        return _flag(body, "logprobs")
    value = body.get("logprobs")
    if value not in (None, 0, 1) or value is False or value is True:
        raise refused(
            "logprobs",
            f"must be 0 or 1: the recorded log-probability of each token is known, and those of others are not; got {value!r:.80}.",
        )
    return value is not None


def _stop(body: dict[str, Any]) -> list[str]:
    value = body.get("stop")
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if (
        not isinstance(texts, list)
        or len(texts) > MOST_STOPS
        or not all(isinstance(one, str) and one for one in texts)
    ):
        raise refused(
            "stop", f"must be a text, or a list of up to {MOST_STOPS} texts that are not empty, got {value!r:.80}."
        )
    return texts


def _config(body: dict[str, Any], config: DecodingConfig) -> DecodingConfig:
    changes: dict[str, Any] = {}
    for name in ("temperature", "top_p"):
        value = body.get(name)
        if value is None:
            continue
        if not is_number(value):
            raise refused(name, f"must be a number, got {value!r:.80}.")
        changes[name] = None if name == "top_p" and value == 1 else float(value)
    try:
        return replace(config, **changes)
    except (ValueError, OverflowError) as error:
        raise refused(next(iter(changes)), str(error)) from error


def _wishes(body: dict[str, Any], prompts: list[list[int]], number: int) -> list[Wish]:
    """The responses, in the order of the choices. The first one has the seed of the request, the others seeds made of it."""
    seed = _whole(body, "seed", secrets.randbits(63), 0, 2**63 - 1)
    pairs = enumerate(prompt for prompt in prompts for _ in range(number))
    return [Wish(prompt, derive_seed(seed, place) if place else seed) for place, prompt in pairs]


# -------------------------------------------------------------------------------------------------------------- prompts


def _conversation(body: dict[str, Any], policy: Policy) -> list[list[int]]:
    if not policy.tokenizer.chat_template:
        raise ApiError(
            400,
            "The tokenizer of this policy has no chat template: use /v1/completions.",
            "messages",
            "no_chat_template",
        )
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise refused("messages", f"must be a list of messages, got {messages!r:.80}.")
    return _encoded("messages", lambda: policy.encode([messages]))


def _prompts(body: dict[str, Any], policy: Policy, limits: Limits) -> list[list[int]]:
    prompt = body.get("prompt")
    what = "must be a text, token ids, or a list of texts or of lists of token ids"
    several = prompt if isinstance(prompt, list) and prompt and not _are_ids(prompt) else [prompt]
    if len(several) > limits.responses:
        raise refused("prompt", f"holds {len(several)} prompts, more than {limits.responses} responses.")
    if all(isinstance(one, str) and one for one in several):
        return _encoded("prompt", lambda: policy.encode(several))
    if all(_are_ids(one) for one in several):
        return cast("list[list[int]]", several)
    raise refused("prompt", f"{what}, none of them empty, got {prompt!r:.80}.")


def _are_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)


def _encoded(param: str, encode: Callable[[], list[list[int]]]) -> list[list[int]]:
    """What a tokenizer makes of prompts. It may fail in any way on what a client sends, such as half of a surrogate pair."""
    try:
        return encode()
    except Exception as error:
        raise refused(param, f"cannot be tokenized ({type(error).__name__}: {error!s:.300}).") from error
