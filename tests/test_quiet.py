"""No command shows remarks of libraries that its user can do nothing about; errors and our own warnings are shown."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import trl_diffusion.commands  # noqa: F401  (which hushes)
from trl_diffusion import quiet
from trl_diffusion.quiet import LOGGERS, REMARKS, hush, hush_commands


@pytest.mark.parametrize("name", [*LOGGERS, "trl_diffusion"])
def test_loggers(name, caplog):
    for level in (logging.WARNING, logging.ERROR):
        logging.getLogger(name).log(level, "about a kernel that is missing")
    shown = [record.levelname for record in caplog.records]
    assert shown == (["WARNING", "ERROR"] if name == "trl_diffusion" else ["ERROR"])


REMARKED = [
    ("DeepSpeed", "Setting accelerator to CPU. If you have GPU", False),
    ("DeepSpeed", "The gradients overflow", True),
    ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast from torch.float32 to float16", False),
    ("bitsandbytes.autograd._functions", "Some matrices hidden dimension is not a multiple of 64", True),
    ("lm_eval.api.task", "gsm8k: Custom kwargs can be passed to `--metadata` in console", False),
    ("lm_eval.api.task", "gsm8k: no metric is known", True),
    ("torch.distributed.elastic.agent.server.api", "Received 2 death signal, shutting down workers", False),
    ("torch.distributed.elastic.agent.server.api", "Received 15 death signal, shutting down workers", True),
    ("torch.distributed.elastic.multiprocessing.api", "Sending process 12 closing signal SIGTERM", False),
    ("torch.distributed.elastic.multiprocessing.api", "Unable to shutdown process 12", True),
    ("torch.distributed.elastic.multiprocessing.api", "failed (exitcode: 130) local_rank: 0", False),
    ("torch.distributed.elastic.multiprocessing.api", "failed (exitcode: 2) local_rank: 0", False),
    ("torch.distributed.elastic.multiprocessing.api", "failed (exitcode: -9) local_rank: 0", True),
]


def test_single_remarks():
    """Other warnings of the same loggers are shown; and the libraries still say what is looked for."""
    hush()  # a second time
    for name, text, shown in REMARKED:
        logger = logging.getLogger(name)
        record = logger.makeRecord(name, logging.WARNING, "file.py", 1, text, (), None)
        assert bool(logger.filter(record)) == shown, text
        assert len(logger.filters) == 1
    assert {name for name, *_ in REMARKED} == set(REMARKS)
    sources = {
        "torch.distributed.elastic": [
            "Received %s death signal",
            "Sending process %s closing signal",
            "failed (exitcode: %s)",
        ]
    }
    if find_spec("bitsandbytes") is not None:
        sources["bitsandbytes.autograd"] = ["MatMul8bitLt: inputs will be cast"]
    if find_spec("lm_eval") is not None:
        sources["lm_eval.api"] = ["Custom kwargs can be passed to `--metadata`"]
    if find_spec("deepspeed") is not None:
        sources["deepspeed.accelerator"] = ["Setting accelerator to CPU."]
    for package, texts in sources.items():
        (folder,) = find_spec(package).submodule_search_locations
        code = "".join(
            path.read_text()
            for path in Path(folder).rglob("*.py")
            if path.stem in ("api", "real_accelerator", "task", "_functions")
        )
        assert all(text in code for text in texts)


def test_the_trainer_is_quiet_without_a_command(monkeypatch):
    """Who trains in Python imports no command. What is hushed there is hushed before TRL is imported."""
    import trl_diffusion.trainer

    called = []
    monkeypatch.setattr(quiet, "hush", lambda: called.append("hush"))
    importlib.reload(trl_diffusion.trainer)
    assert called == ["hush"]
    source = Path(trl_diffusion.trainer.__file__).read_text()
    assert "import" not in source.replace("from ..quiet import hush", "").replace("TRL is imported", "")


@pytest.fixture
def commands_hushed(monkeypatch):
    """What `hush_commands` sets, for one test."""
    monkeypatch.setattr(logging, "lastResort", logging.lastResort)
    before = transformers_logging.set_tqdm_hook(None)
    hush_commands()
    yield
    transformers_logging.set_tqdm_hook(before)


def test_bars_of_loading_and_saving_come_late(commands_hushed, monkeypatch, capsys):
    """A model that is loaded within seconds shows no bar; one that takes longer does."""
    for seconds, shown in ((quiet.SLOW, False), (1e-9, True)):
        monkeypatch.setattr(quiet, "SLOW", seconds)
        for _ in transformers_logging.tqdm(range(50), desc="Loading weights", mininterval=0):
            pass
        assert ("Loading weights" in capsys.readouterr().err) == shown


def test_warnings_are_lines(commands_hushed, capsys):
    """One line each, without the number of a process that is the only one, above a bar, which stays whole."""
    handler = logging.lastResort
    with tqdm(total=2, file=sys.stderr, mininterval=0, ncols=60) as bar:
        bar.update()
        for text in ("[RANK 0] Dropout is\noff.", "[RANK 1] Nothing %s"):
            handler.handle(logging.makeLogRecord({"msg": text, "levelno": logging.WARNING, "levelname": "WARNING"}))
    lines = [line.rpartition("\r")[2] for line in capsys.readouterr().err.splitlines()]
    assert "warning: Dropout is off." in lines and "warning: [RANK 1] Nothing %s" in lines
    assert [line for line in lines if "1/2" in line][-1].count("%|") == 1


@pytest.mark.parametrize(
    ("module", "category", "shown"),
    [
        ("transformers.training_args", FutureWarning, False),
        ("transformers.modeling_utils", FutureWarning, False),
        ("torch.distributed.c10d_logger", FutureWarning, False),
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
