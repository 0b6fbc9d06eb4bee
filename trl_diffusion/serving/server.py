"""From a policy to a server that listens."""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any

import uvicorn
import xxhash

from ..decoding.config import DecodingConfig
from ..decoding.decode import check_settings
from ..fields import AtLeast, check_fields
from ..policies.forward import unwrap
from ..policies.policy import Policy
from ..policies.trial import try_policy
from ..trajectories.fingerprint import fingerprint_policy, fingerprint_tokenizer
from .app import Service
from .engine import Engine
from .requests import Limits


logger = logging.getLogger(__name__)

LONGEST_PROMPT = 2048  # tokens, if neither the policy nor the user says less or more
MOST_RESPONSES = 64  # of a request, if the user does not say
MOST_CONNECTIONS = 2048
GRACE = 10  # seconds that answers have to be finished after Ctrl-C


@dataclass(kw_only=True)
class ServerOptions:
    """
    How much a server takes on.

    Attributes:
        max_batch (`int`): responses that are denoised at once.
        max_queue (`int`): responses that wait. A request for which there is no room is answered with status 429.
        max_prompt_tokens (`int`, *optional*): tokens of a prompt.
        max_responses (`int`, *optional*): responses of a request: its prompts times `n`. Defaults to 64, or `max_queue` if that
            is less.
        max_body_bytes (`int`): bytes of a request.
    """

    max_batch: Annotated[int, AtLeast(1)] = 64
    max_queue: Annotated[int, AtLeast(1)] = 256
    max_prompt_tokens: Annotated[int, AtLeast(1)] | None = None
    max_responses: Annotated[int, AtLeast(1)] | None = None
    max_body_bytes: Annotated[int, AtLeast(1)] = 4_000_000

    def __post_init__(self):
        check_fields(self)
        if self.max_responses is not None and self.max_responses > self.max_queue:
            raise ValueError(
                f"`max_responses={self.max_responses}` of a request are more than `max_queue={self.max_queue}`, which all wait at "
                "first. Lower the one, or raise the other."
            )

    @property
    def responses(self) -> int:
        """Most responses of a request."""
        return self.max_responses or min(MOST_RESPONSES, self.max_queue)


def make_service(
    policy: Policy,
    config: DecodingConfig,
    options: ServerOptions,
    name: str,
    api_key: str | None = None,
) -> Service:
    """
    The endpoints of a policy.

    Args:
        policy ([`Policy`]): the policy.
        config ([`DecodingConfig`]): settings, unless a request says otherwise. A request may ask for up to `max_new_tokens`.
        options ([`ServerOptions`]): how much it takes on.
        name (`str`): what it is called.
        api_key (`str`, *optional*): what clients must send.

    Raises:
        ValueError: if a setting does not apply to this policy, or its context leaves no room for a prompt.
    """
    spec, model_config = policy.spec, unwrap(policy.model).config
    check_settings(config, spec, model_config.get_text_config().vocab_size)
    if config.allow_mask_token:
        raise ValueError("`allow_mask_token=True` leaves mask tokens in responses. Leave it out.")
    if policy.context is not None and spec.longest_prompt(policy.context, config.max_new_tokens) < 1:
        raise ValueError(
            f"`max_new_tokens={config.max_new_tokens}` leaves no room for a prompt in the policy's context of {policy.context}."
        )
    room = LONGEST_PROMPT if policy.context is None else min(LONGEST_PROMPT, spec.longest_prompt(policy.context, 1))
    longest = options.max_prompt_tokens or room
    try_policy(policy.model, spec, cached=spec.attention == "block" or config.approximate_cache is not None)
    facts: dict[str, Any] = {
        "policy_fingerprint": fingerprint_policy(policy.model),
        "tokenizer_fingerprint": fingerprint_tokenizer(policy.tokenizer),
        "spec": spec.to_dict(),
        "decoding": config.to_dict(),
    }
    digest = xxhash.xxh3_64_hexdigest(json.dumps(facts, sort_keys=True).encode())
    facts |= {
        "system_fingerprint": f"trl_diffusion-{digest}",
        "max_tokens": config.max_new_tokens,
        "max_prompt_tokens": longest,
        "max_responses": options.responses,
    }
    engine = Engine(policy, longest, options.max_batch, options.max_queue)
    limits = Limits(config.max_new_tokens, longest, options.responses, options.max_body_bytes)
    return Service(policy, engine, config, limits, [name], facts, api_key)


def listen_at(host: str, port: int) -> socket.socket:
    """
    A socket that listens. Warns if other machines can reach it.

    Raises:
        ValueError: if there can be none at this address.
    """
    try:
        found = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"Nothing can listen at {host}, port {port} ({why}). Choose another --host or --port."
        ) from error
    if not ipaddress.ip_address(found.getsockname()[0]).is_loopback:
        logger.warning(
            f"Every machine that reaches {host} can use this server, and what is sent is not encrypted. Set --api_key_env, and "
            "put a proxy with TLS before it."
        )
    return found


class Server(uvicorn.Server):
    """
    Serves at a socket until Ctrl-C or SIGTERM. Responses that wait are refused then, and those that are being denoised have
    some seconds to be finished.

    Args:
        service ([`Service`]): the endpoints.
        listener (`socket.socket`): where it listens.
    """

    def __init__(self, service: Service, listener: socket.socket):
        self.service, self.listener = service, listener
        super().__init__(
            uvicorn.Config(
                service.app(),
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=GRACE,
            )
        )

    @property
    def url(self) -> str:
        """The address of its API."""
        host, port = self.listener.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def serve_here(self) -> None:
        """Serves, in this thread."""
        self.run(sockets=[self.listener])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.service.engine.drain()
