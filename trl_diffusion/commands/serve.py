"""
Serves a policy as an OpenAI-compatible endpoint, for `collect --server` and for any client of the OpenAI API.

    trl-diffusion serve                                      # the embedded policy, at http://127.0.0.1:8000/v1
    trl-diffusion serve --model_name_or_path MODEL --max_new_tokens 256 --strategy threshold --max_batch 32
    curl --json '{"prompt": "sudoku 3102200002100320", "max_tokens": 17}' http://127.0.0.1:8000/v1/completions

Requests join those that are being denoised. Ctrl-C finishes what is being denoised, and ends. It needs starlette and uvicorn:
pip install 'trl-diffusion[serve]'.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

from ..decoding.options import add_decoding_options, given_decoding
from ..quiet import hush_commands
from ..utils import use_all_cores
from .direct import add_policy_options, open_given, run_directly
from .parser import PROG, Parser, read_api_key


def main(arguments: list[str] | None = None) -> int:
    """Runs the command, with the options of the command line by default; see [`run_directly`]."""
    return run_directly(_parser(), arguments, _serve)


def _serve(options: argparse.Namespace) -> None:
    hush_commands()
    from ..policies.prompts import read_chat_template_kwargs

    try:
        from ..serving.server import Server, ServerOptions, listen_at, make_service
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "h11", "anyio", "click"):
            raise
        raise ImportError(
            f"A server needs {error.name}, which is missing: pip install 'trl-diffusion[serve]'."
        ) from error
    given = {one.name: getattr(options, one.name) for one in fields(ServerOptions)}
    limits = ServerOptions(**{name: value for name, value in given.items() if value is not None})
    config, api_key = given_decoding(options), read_api_key(options.api_key_env)
    listener = listen_at(options.host, options.port)
    with listener:
        use_all_cores()
        policy = open_given(
            options, "_name_or_path", chat_template_kwargs=read_chat_template_kwargs(options.chat_template_kwargs)
        )
        name = options.served_model_name or options.adapter_name_or_path or options.model_name_or_path or "embedded"
        server = Server(make_service(policy, config, limits, name, api_key), listener)
        print(f"{name} is served at {server.url}. Ctrl-C ends it.", flush=True)
        server.serve_here()


def _parser() -> Parser:
    parser = Parser(f"{PROG} serve", description=__doc__)
    group = parser.add_argument_group("policy")
    add_policy_options(group, "_name_or_path")
    group.add_argument(
        "--chat_template_kwargs", help="variables of the chat template, like enable_thinking:false, or JSON"
    )
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; others than this machine's own are warned of"
    )
    group.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen at, 0 for a free one")
    group.add_argument("--served_model_name", help="what clients call the policy (default: its path)")
    group.add_argument(
        "--api_key_env", metavar="NAME", help="variable of the environment with a key that clients must send"
    )
    for name, text in (
        ("max_batch", "most responses that are denoised at once (default: 64)"),
        ("max_queue", "most responses that wait (default: 256)"),
        ("max_prompt_tokens", "most tokens of a prompt (default: 2048, or less if the policy's context is shorter)"),
        ("max_responses", "most responses of a request, its prompts times n (default: 64)"),
        ("max_body_bytes", "most bytes of a request (default: 4000000)"),
    ):
        group.add_argument(f"--{name}", type=int, metavar="N", help=text)
    group = parser.add_argument_group(
        "decoding", "Settings of DecodingConfig. Requests may change temperature, top_p and max_tokens."
    )
    add_decoding_options(group)
    return parser


if __name__ == "__main__":
    sys.exit(main())
