"""No command shows remarks of libraries that its user can do nothing about; errors and our own warnings are shown."""

from __future__ import annotations

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

import trl_diffusion.commands  # noqa: F401  (which hushes)
from trl_diffusion.quiet import DEEPSPEED, LOGGERS, NO_GPU, hush


@pytest.mark.parametrize("name", [*LOGGERS, "trl_diffusion"])
def test_loggers(name, caplog):
    for level in (logging.WARNING, logging.ERROR):
        logging.getLogger(name).log(level, "about a kernel that is missing")
    shown = [record.levelname for record in caplog.records]
    assert shown == (["WARNING", "ERROR"] if name == "trl_diffusion" else ["ERROR"])


def test_no_gpu_is_no_alarm():
    """Other warnings of DeepSpeed are shown; and it still says what is looked for."""
    logger = logging.getLogger(DEEPSPEED)
    for text, shown in ((f"{NO_GPU} If you have one, ...", False), ("The gradients overflow", True)):
        record = logger.makeRecord(DEEPSPEED, logging.WARNING, "file.py", 1, text, (), None)
        assert bool(logger.filter(record)) == shown
    package = find_spec("deepspeed")
    if package is not None:
        (folder,) = package.submodule_search_locations
        assert NO_GPU in (Path(folder) / "accelerator" / "real_accelerator.py").read_text()


@pytest.mark.parametrize(
    ("module", "category", "shown"),
    [
        ("transformers.training_args", FutureWarning, False),
        ("transformers.modeling_utils", FutureWarning, False),
        ("transformers.modeling_utils", UserWarning, True),
        ("transformers.hf_argparser", FutureWarning, True),  # to which our own old names are ascribed
        ("trl_diffusion.decoding.options", FutureWarning, True),
    ],
)
def test_warnings(module, category, shown):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        hush()
        warnings.warn_explicit("another name", category, f"{module}.py", 1, module=module)
    assert len(found) == shown
