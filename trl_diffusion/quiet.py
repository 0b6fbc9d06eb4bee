"""What runs do not show: remarks of libraries about what their user neither chose nor can change."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any


# They say on import that kernels for weights of 4 bits are missing, and on a launch which options were left out.
LOGGERS = ("bitsandbytes.backends.cpu.ops", "accelerate.commands.launch")
# They say which names of theirs TRL and, at every step, DeepSpeed should use instead of others.
MODULES = ("transformers.training_args", "transformers.modeling_utils", "torch.distributed.c10d_logger")
# Single remarks of loggers whose other warnings are shown, as patterns: DeepSpeed says on import that there is no GPU, bitsandbytes
# says at every layer how it computes with weights of 8 bits, the harness names options of its own command, and the launcher of several
# processes repeats at their end what Ctrl-C or their own line of error has said.
REMARKS = {
    "DeepSpeed": r"Setting accelerator to CPU\.",
    "bitsandbytes.autograd._functions": r"MatMul8bitLt: inputs will be cast",
    "lm_eval.api.task": r"\S+: Custom kwargs can be passed to `--metadata`",
    "torch.distributed.elastic.agent.server.api": r"Received (2|\S*SIGINT) death signal",
    "torch.distributed.elastic.multiprocessing.api": r"Sending process \d+ closing signal|failed \(exitcode: (2|130)\)",
}
SLOW = 10.0  # seconds after which loading or saving a model shows its progress


def hush() -> None:
    """Hides these remarks, in this process. Errors are shown."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name, remark in REMARKS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Without) for one in logger.filters):
            logger.addFilter(_Without(remark))
    for name in MODULES:
        warnings.filterwarnings("ignore", category=FutureWarning, module=re.escape(name))


def hush_commands() -> None:
    """
    What commands do as well, when they have imported what they need: progress bars of loading and of saving appear only if that
    takes long, and warnings are lines that begin with "warning:", which do not break a progress bar.
    """
    from transformers.utils.logging import set_tqdm_hook

    set_tqdm_hook(_later)
    logging.lastResort = _Lines(logging.WARNING)


def _later(make: Callable[..., Any], arguments: tuple, options: dict[str, Any]) -> Any:
    return make(*arguments, **{"delay": SLOW, **options})


class _Without(logging.Filter):
    """Leaves out messages that begin with a pattern."""

    def __init__(self, remark: str):
        super().__init__()
        self.remark = re.compile(remark)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.remark.match(record.getMessage())


class _Lines(logging.Handler):
    """Writes a record as one line to stderr, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        text = re.sub(r"^\[RANK 0\] ", "", record.getMessage())
        tqdm.write(f"{record.levelname.lower()}: {' '.join(text.split())}", file=sys.stderr)
