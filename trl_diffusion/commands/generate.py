"""
Answers a prompt on the terminal, and shows how the answer is denoised.

    trl-diffusion generate "sudoku 3102200002100320" --max_new_tokens 17 --tokens_per_step 2
    trl-diffusion generate "What is 17 + 25?" --model MODEL --chat --strategy threshold
    trl-diffusion generate "What is 17 + 25?" --adapter outputs/llada --chat
    echo "sudoku 3102200002100320" | trl-diffusion generate --max_new_tokens 17 > answer.txt

Without a model, the embedded policy answers. On a terminal a masked position is shown as `░`. Elsewhere, such as in a
file, only the answer is written.
"""

from __future__ import annotations

import argparse
import sys

from ..decoding.options import add_decoding_options, given_decoding
from ..quiet import hush_commands
from ..utils import printable
from .direct import add_policy_options, open_given, run_directly
from .parser import PROG, Parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command, with the options of the command line by default; see [`run_directly`]."""
    return run_directly(_parser(), arguments, _print)


def _print(options: argparse.Namespace) -> None:
    """Prints the answer: on a terminal without what would control it, elsewhere as it is."""
    hush_commands()
    answer = _answer(options)
    print(printable(answer) if sys.stdout.isatty() else answer)


def _answer(options: argparse.Namespace) -> str:
    from ..decoding.generate import generate
    from ..policies.prompts import read_chat_template_kwargs

    config = given_decoding(options)
    template = read_chat_template_kwargs(options.chat_template_kwargs)
    if template and not options.chat:
        raise ValueError("--chat_template_kwargs is for conversations: add --chat, or leave it out.")
    prompt = _prompt(options.prompt)
    policy = open_given(options)
    if options.chat and not policy.tokenizer.chat_template:
        raise ValueError("--chat: the tokenizer has no chat template. Leave --chat out, or pass another --tokenizer.")
    answers = generate(
        policy.model,
        policy.tokenizer,
        [[{"role": "user", "content": prompt}]] if options.chat else prompt,
        config,
        seed=options.seed,
        streamer=sys.stdout.isatty() if options.stream is None else options.stream,
        spec=policy.spec,
        chat_template_kwargs=template,
    )
    return answers.texts[0]


def _prompt(given: str | None) -> str:
    """The prompt of the command line, or standard input without the newline at its end."""
    if given is None or given == "-":
        if sys.stdin.isatty():
            raise ValueError("There is no prompt. Pass one in quotes, or on standard input.")
        try:
            given = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"The prompt is not text in UTF-8 ({error}).") from error
    if not given:
        raise ValueError("The prompt is empty.")
    if any("\ud800" <= character <= "\udfff" for character in given):
        raise ValueError("The prompt is not text in UTF-8.")
    return given


def _parser() -> Parser:
    parser = Parser(f"{PROG} generate", description=__doc__)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to answer (default: standard input)")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    parser.add_argument(
        "--chat_template_kwargs", help="variables of the chat template, like enable_thinking:false, or JSON"
    )
    add_policy_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="source of randomness at a temperature (default: 0)")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="show the steps of denoising (default: on a terminal)",
    )
    group = parser.add_argument_group("decoding", "Settings of DecodingConfig.")
    add_decoding_options(group)
    return parser


if __name__ == "__main__":
    sys.exit(main())
