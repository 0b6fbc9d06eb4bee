"""How a command that needs no launcher is run, and how it opens a policy."""

from __future__ import annotations

from argparse import Namespace, _ActionsContainer
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..utils import exit_code, read_mapping
from .interrupt import ending_in_a_line
from .parser import Parser


if TYPE_CHECKING:
    from ..policies.policy import Policy


def run_directly(
    parser: Parser,
    arguments: list[str] | None,
    work: Callable[[Namespace], object],
    kept: Callable[[], str] = lambda: "",
) -> int:
    """
    Runs a command.

    Args:
        parser ([`Parser`]): its options.
        arguments (`list[str]`, *optional*): what follows its name. `None` for `sys.argv`.
        work (`Callable[[Namespace], object]`): what it does.
        kept (`Callable[[], str]`, *optional*): see [`ending_in_a_line`].

    Returns:
        `int`: exit code: 0, or 2 after one line on stderr that says what is wrong.
    """
    options = parser.parse_args(arguments)
    with ending_in_a_line(kept):
        return exit_code(lambda: work(options))


def add_policy_options(parser: _ActionsContainer, suffix: str = "") -> None:
    """
    Adds the options that say which policy to open, for [`open_given`].

    Args:
        parser: where to add them.
        suffix (`str`, *optional*): what the names of the paths end with, such as `"_name_or_path"`.
    """
    for name, text in (
        ("model", "path or hub id (default: the adapter's, or else the embedded policy)"),
        ("adapter", "path or hub id of a LoRA adapter"),
        ("tokenizer", "path or hub id, if it is not where the model is"),
    ):
        parser.add_argument(f"--{name}{suffix}", help=text)
    parser.add_argument("--dtype", default="auto", help="type of the weights, such as bfloat16")
    for bits in (8, 4):
        parser.add_argument(f"--load_in_{bits}bit", action="store_true", help=f"round the weights to {bits} bits")
    parser.add_argument(
        "--diffusion_spec", help="fields of DiffusionSpec that the model lacks, like block_size:32, or JSON"
    )


def open_given(options: Namespace, suffix: str = "", **more: Any) -> Policy:
    """
    Opens the policy that the options of [`add_policy_options`] name, the embedded one by default.

    Args:
        options (`Namespace`): the options.
        suffix (`str`, *optional*): as for [`add_policy_options`].
        more: further arguments of [`~policies.policy.open_policy`].
    """
    from ..policies.policy import open_policy
    from ..policies.quantized import rounding
    from ..policies.tiny import tiny_policy_path

    model, adapter, tokenizer = (getattr(options, f"{name}{suffix}") for name in ("model", "adapter", "tokenizer"))
    return open_policy(
        model or (None if adapter else tiny_policy_path()),
        adapter,
        tokenizer,
        dtype=options.dtype,
        quantization=rounding(options.load_in_4bit, options.load_in_8bit, options.dtype),
        diffusion_spec=read_mapping(options.diffusion_spec, "diffusion_spec"),
        **more,
    )
