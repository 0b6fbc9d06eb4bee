"""Ctrl-C ends every command with one line, which says what is kept and how to go on, and with exit code 130."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers import TrainerCallback

from tests.processes import HANGS
from trl_diffusion import cli
from trl_diffusion.commands import collect, evaluate, generate, interrupt, iterate, launch, train
from trl_diffusion.commands.interrupt import TYPED, ending_in_a_line, left_to_the_child
from trl_diffusion.commands.lines import RunLines


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def handler():
    """Afterwards, Ctrl-C is handled as before."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def stop(*_args, **_options):
    raise KeyboardInterrupt


def line_of(command, capsys) -> str:
    """The line of a command that is interrupted."""
    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == 130
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.endswith("\n"), err
    return err.strip()


def test_any_work(capsys):
    def work():
        with ending_in_a_line(lambda: "3 of 5 shards are kept."):
            stop()

    assert line_of(work, capsys) == "Stopped by Ctrl-C. 3 of 5 shards are kept."
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # the program ends: a second Ctrl-C changes nothing
    with pytest.raises(ValueError, match="other"), ending_in_a_line():
        raise ValueError("other")


def test_an_error_that_is_the_consequence_of_an_interrupt(capsys, monkeypatch):
    """Another process has ended first: what the connection to it raises is not shown, as Ctrl-C is pending here, too."""
    monkeypatch.setattr(
        interrupt, "_take_pending", lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    )

    def work():
        with ending_in_a_line():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("Connection closed by peer")

    assert line_of(work, capsys) == "Stopped by Ctrl-C."


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_several_processes(rank, capsys, monkeypatch):
    """The first one prints the line. All end at once, without waiting for each other."""
    ended = []
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code) or sys.exit(code))
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit), ending_in_a_line():
        stop()
    assert ended == [130] and capsys.readouterr().err == ("Stopped by Ctrl-C.\n" if rank == 0 else "")


def test_while_a_command_is_imported():
    code = "import trl_diffusion.commands, time; print('imports', flush=True); time.sleep(600)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests that run in the background ignore it
    )  # fmt: skip
    assert process.stdout.readline() == "imports\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANGS)
    assert (process.returncode, err) == (130, "Stopped by Ctrl-C.\n")


# -------------------------------------------------------------------------------------------------------- the launcher


def test_a_single_process_takes_the_place_of_its_launcher(monkeypatch):
    """Its signals and its exit code are its own; accelerate has told it what it tells a process that it starts."""
    became = []
    monkeypatch.setattr(os, "execvpe", lambda *call: became.append(call) or sys.exit())
    monkeypatch.setattr(
        sys, "argv", ["launch", "--num_processes", "1", "--module", "trl_diffusion.commands.train", "--seed", "1"]
    )
    with pytest.raises(SystemExit):
        launch.main()
    ((program, words, environment),) = became
    assert words == [program, "-m", "trl_diffusion.commands.train", "--seed", "1"]
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"


@pytest.mark.parametrize(
    ("exit_code", "ended", "message"),
    [
        (130, 130, ""),
        (2, 2, ""),
        (1, 1, ""),
        (-9, 137, "error: process 1 was ended by SIGKILL, as by a lack of memory.\n"),
    ],
)
def test_exit_codes_of_several_processes(exit_code, ended, message, capsys, monkeypatch):
    def fail():
        raise ChildFailedError(
            "train", {1: ProcessFailure(local_rank=1, pid=1, exitcode=exit_code, error_file="none")}
        )

    monkeypatch.setattr(launch.launch, "main", fail)
    with pytest.raises(SystemExit) as end:
        launch.main()
    assert end.value.code == ended and capsys.readouterr().err == message


def test_several_processes_are_interrupted(monkeypatch):
    def fail():
        raise SignalException("interrupted", signal.SIGINT)

    monkeypatch.setattr(launch.launch, "main", fail)
    with pytest.raises(SystemExit) as end:
        launch.main()
    assert end.value.code == 130


# -------------------------------------------------------------------------------------------------------- the commands


def test_generate(capsys, monkeypatch):
    monkeypatch.setattr(generate, "_answer", stop)
    assert line_of(lambda: cli.main(["generate", "x"]), capsys) == "Stopped by Ctrl-C."


def test_collect(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(collect, "run", stop)
    monkeypatch.setenv(TYPED, "trl-diffusion collect --output_dir data")
    work = lambda: collect.main(["--output_dir", "data"])  # noqa: E731
    assert line_of(work, capsys) == "Stopped by Ctrl-C. Nothing was collected yet."
    (tmp_path / "data" / "data").mkdir(parents=True)
    (tmp_path / "data" / "collection.json").write_text(json.dumps({"num_shards": 5}))
    for shard in range(2):
        (tmp_path / "data" / "data" / f"shard-{shard:05d}.parquet").touch()
    expected = "2 of 5 shards are kept in data. To go on: trl-diffusion collect --output_dir data"
    assert line_of(work, capsys) == f"Stopped by Ctrl-C. {expected}"
    monkeypatch.delenv(TYPED)
    assert line_of(work, capsys).endswith("kept in data. To go on, give the same command again.")


def test_evaluate(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "run", stop)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sudoku_seed1.json").touch()
    words = ["--tasks", "sudoku", "countdown", "--seeds", "0", "1", "--output_dir", "out"]
    line = line_of(lambda: evaluate.main(words), capsys)
    assert line.startswith("Stopped by Ctrl-C. 1 of 4 measurements are kept in out. To go on")


@pytest.mark.parametrize("code", [130, -2])
def test_iterate_leaves_the_line_to_its_command(code, capsys, monkeypatch, tmp_path):
    """A terminal sends Ctrl-C to both: the command says what is kept, `iterate` ends after it."""
    monkeypatch.chdir(tmp_path)
    environments = []

    def run(command, check, env):
        environments.append(env)
        os.kill(os.getpid(), signal.SIGINT)
        raise subprocess.CalledProcessError(code, command)

    monkeypatch.setattr(iterate.subprocess, "run", run)
    assert iterate.main(["--rounds", "2", "--output_dir", "my runs"]) == 130
    out, err = capsys.readouterr()
    assert (
        out.startswith("Settings: ")
        and out.endswith("Output: my runs, with 2 rounds.\n")
        and out.count("\n") == 1
        and not err
    )
    monkeypatch.setattr(os, "environ", environments[0])
    assert interrupt.is_part()
    expected = "To go on: trl-diffusion iterate --rounds 2 --output_dir 'my runs'"
    assert interrupt.how_to_go_on("--resume_from_checkpoint", "true") == expected


def test_iterate_between_its_commands(capsys, monkeypatch):
    monkeypatch.setattr(iterate, "rounds_of", stop)
    assert line_of(lambda: iterate.main(["--rounds", "2"]), capsys).endswith(
        "To go on: trl-diffusion iterate --rounds 2"
    )


def test_left_to_the_child():
    before = signal.getsignal(signal.SIGINT)
    with left_to_the_child():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


STATES = {
    "before there is a trainer": ({}, None, "The run had not begun: nothing is kept."),
    "before the first update": ({"max_steps": 0}, None, "The run had not begun: nothing is kept."),
    "before the first checkpoint": ({"global_step": 3}, None, "3 of 60 updates were made, and nothing is kept: there was no checkpoint yet."),
    "after a checkpoint": (
        {"global_step": 13}, 10,
        "13 of 60 updates were made, out/checkpoint-10 is kept. To go on: trl-diffusion train --seed 1 --resume_from_checkpoint true",
    ),
    "after training": ({"global_step": 60, "is_saved": True}, 60, "60 of 60 updates were made, and the trained policy is in out. It was not measured."),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_what_is_kept_of_a_run(name, monkeypatch):
    changes, saved_at, expected = STATES[name]
    monkeypatch.setenv(TYPED, "trl-diffusion train --seed 1")
    args = SimpleNamespace(output_dir="out", resume_from_checkpoint=None)
    state = SimpleNamespace(**{"max_steps": 60, "global_step": 0, **changes})
    bar = SimpleNamespace(closed=False, close=lambda: setattr(bar, "closed", True))
    handler = SimpleNamespace(callbacks=[SimpleNamespace(training_bar=bar), TrainerCallback()])
    trainer = SimpleNamespace(args=args, state=state, callback_handler=handler, add_callback=lambda one: None)
    lines = RunLines()
    if changes:
        lines.follow(trainer, stored=False)
    if saved_at:
        lines.on_save(args, SimpleNamespace(global_step=saved_at), None)
    lines.is_saved = changes.get("is_saved", False)
    assert lines.kept() == expected
    assert bar.closed == bool(changes)


def test_train(capsys, monkeypatch, tmp_path):
    """A run that goes on from a checkpoint has it still, and its command need not be changed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "checkpoint-20").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-20" / "checkpoint_complete").touch()
    typed = "trl-diffusion train --output_dir out --resume_from_checkpoint true"
    monkeypatch.setenv(TYPED, typed)

    def run(script_args, training_args, model_args, lines):
        lines.follow(SimpleNamespace(
            args=training_args, state=SimpleNamespace(max_steps=0), callback_handler=SimpleNamespace(callbacks=[]),
            add_callback=lambda one: None,
        ), stored=False)  # fmt: skip
        stop()

    monkeypatch.setattr(train, "run", run)
    line = line_of(lambda: train.main([*typed.split()[2:], "--bf16", "false"]), capsys)
    assert line == f"Stopped by Ctrl-C. The run had not begun: out/checkpoint-20 is kept. To go on: {typed}"
