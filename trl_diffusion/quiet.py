"""What commands do not show: remarks of libraries about what their user neither chose nor can change."""

from __future__ import annotations

import logging
import re
import warnings


# They say on import that kernels for weights of 4 bits are missing, and on a launch which options were left out.
LOGGERS = ("bitsandbytes.backends.cpu.ops", "accelerate.commands.launch")
# They say which names of theirs TRL should use instead of others.
MODULES = ("transformers.training_args", "transformers.modeling_utils")
# It says on import that there is no GPU, which the name of its logger alone does not tell from its warnings about a run.
DEEPSPEED, NO_GPU = "DeepSpeed", "Setting accelerator to CPU."


def hush() -> None:
    """Hides these remarks, in this process. Errors are shown."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger(DEEPSPEED).addFilter(_is_about_the_run)
    for name in MODULES:
        warnings.filterwarnings("ignore", category=FutureWarning, module=re.escape(name))


def _is_about_the_run(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NO_GPU)
