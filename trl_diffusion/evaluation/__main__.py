"""
lm-evaluation-harness with the model `trl_diffusion`: its command line, unchanged.

    python -m trl_diffusion.evaluation --model trl_diffusion --model_args pretrained=MODEL --tasks gsm8k
"""

from __future__ import annotations

from ..quiet import hush


hush()

from . import harness  # noqa: E402, F401  (registers the model)


def main() -> None:
    """Runs the harness's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
