"""Checkpoints on disk: complete, damaged, deleted, and written by one training at a time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.offline.conftest import start  # noqa: F401
from trl_diffusion.trainer import checkpoints
from trl_diffusion.trainer.checkpoints import (
    LOCK,
    MARK,
    find_fault,
    last_complete_checkpoint,
    only_training_in,
    rotate,
)


OPTIONS = {"max_steps": 3, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def run(make_trainer, start, tmp_path_factory):  # noqa: F811
    """Checkpoints of a run after one, two and three steps; 1 and 3 are inside a rollout. Made once."""
    directory = tmp_path_factory.getbasetemp() / "three-checkpoints"
    if not directory.exists():
        make_trainer(str(start), output_dir=str(directory), **OPTIONS).train()
    return directory


@pytest.fixture
def copy(run, tmp_path):
    """A copy of that run, to be damaged."""
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def overwrite(path: Path) -> None:
    """Another content of the same size."""
    path.write_bytes(b"x" * path.stat().st_size)


LOST = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "rollout_0.pt", "trainer_state.json"]
DAMAGE = [
    *((name, Path.unlink, f"{name} is missing") for name in LOST),
    *((name, truncate, name) for name in LOST),
    *((name, overwrite, f"{name} is damaged") for name in LOST),
    (MARK, truncate, f"{MARK} is damaged"),
]


@pytest.mark.parametrize(("name", "harm", "message"), DAMAGE)
def test_damage_is_found(copy, name, harm, message):
    """By the mark, by what the file must look like, or because nothing goes on exactly without it."""
    newest = copy / "checkpoint-3"
    assert find_fault(newest) is None
    harm(newest / name)
    assert message in find_fault(newest)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_state_that_another_program_left_out_is_missed(copy, name):
    """Also without a mark."""
    (copy / "checkpoint-3" / MARK).unlink()
    assert find_fault(copy / "checkpoint-3") is None
    (copy / "checkpoint-3" / name).unlink()
    assert find_fault(copy / "checkpoint-3") == f"{name} is missing"


def test_what_resuming_does_not_read_may_change(copy):
    (copy / "checkpoint-3" / "README.md").write_text("my notes")
    (copy / "checkpoint-3" / "tokenizer.json").unlink()
    assert find_fault(copy / "checkpoint-3") is None
    assert find_fault(copy / "checkpoint-9") == "there is no such directory"


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_state_of_other_engines(copy, engine):
    """DeepSpeed keeps it in a directory that `latest` names, FSDP in `optimizer_0` or `optimizer.bin`."""
    checkpoint = copy / "checkpoint-3"
    (checkpoint / MARK).unlink()
    (checkpoint / "optimizer.pt").unlink()
    assert "optimizer" in find_fault(checkpoint, engine)
    if engine == "deepspeed":
        (checkpoint / "latest").write_text("global_step3\n")
        assert "optimizer" in find_fault(checkpoint, engine)
        (checkpoint / "scheduler.pt").unlink()  # may be one of DeepSpeed's
        (checkpoint / "global_step3").mkdir()
    else:
        (checkpoint / "optimizer_0").mkdir()
    assert find_fault(checkpoint, engine) is None


# -------------------------------------------------------------------------------------------- going on from one


def test_a_damaged_checkpoint_given_by_name_is_an_error(make_trainer, start, copy):  # noqa: F811
    """Before anything is loaded; all of it in one line."""
    (copy / "checkpoint-3" / "optimizer.pt").unlink()
    trainer = make_trainer(str(start), output_dir=str(copy), **OPTIONS)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(
        ValueError, match="checkpoint-3 cannot be resumed: optimizer.pt is missing. Restore it"
    ) as error:
        trainer.train(resume_from_checkpoint=str(copy / "checkpoint-3"))
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    with pytest.raises(ValueError, match="checkpoint-7 cannot be resumed: there is no such directory"):
        trainer.train(resume_from_checkpoint=str(copy / "checkpoint-7"))


@pytest.mark.parametrize("harm", [truncate, Path.unlink])
def test_an_older_checkpoint_is_taken_if_the_newest_is_damaged(make_trainer, start, copy, run, caplog, harm):  # noqa: F811
    """With a warning that names both; the run is the uninterrupted one."""
    harm(copy / "checkpoint-3" / "model.safetensors")
    trainer = make_trainer(str(start), output_dir=str(copy), **OPTIONS)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]
    (warning,) = [record.message for record in caplog.records if "goes on from" in record.message]
    assert "checkpoint-3 cannot be resumed: model.safetensors" in warning
    assert warning.endswith("goes on from the older " + str(copy / "checkpoint-2") + " instead.")
    states = [json.loads((path / "checkpoint-3/trainer_state.json").read_text()) for path in (copy, run)]
    assert states[0]["log_history"][-1]["loss"] == states[1]["log_history"][-1]["loss"]
    assert find_fault(copy / "checkpoint-3") is None  # written again


def test_nothing_starts_anew_over_damaged_checkpoints(make_trainer, start, copy):  # noqa: F811
    for step in (1, 2, 3):
        truncate(copy / f"checkpoint-{step}" / "optimizer.pt")
    trainer = make_trainer(str(start), output_dir=str(copy), **OPTIONS)
    with pytest.raises(
        ValueError, match=r"checkpoint-3 cannot be resumed: optimizer.pt .*checkpoint-1 cannot.*move these"
    ):
        trainer.train(resume_from_checkpoint=True)
    assert last_complete_checkpoint(copy) == str(copy / "checkpoint-3")


def test_an_unreadable_rollout_is_named(make_trainer, start, copy):  # noqa: F811
    """A file of torch's, but not ours."""
    path = copy / "checkpoint-3" / "rollout_0.pt"
    torch.save({"batches": 3}, path)
    (copy / "checkpoint-3" / MARK).unlink()
    trainer = make_trainer(str(start), output_dir=str(copy), **{**OPTIONS, "max_steps": 4})
    with pytest.raises(ValueError, match="rollout_0.pt cannot be read"):
        trainer.train(resume_from_checkpoint=str(path.parent))


# ------------------------------------------------------------------------------------------- written, and deleted


def watch_disk(monkeypatch) -> list[tuple[str, str]]:
    """What happens to files: each one that reaches the disk, gets another name, or is deleted with its directory."""
    events = []
    fsync, replace, rmtree = os.fsync, os.replace, shutil.rmtree

    def syncing(descriptor):
        events.append(("on the disk", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renaming(source, target, **kwargs):
        events.append(("renamed", str(target)))
        replace(source, target, **kwargs)

    def deleting(path, *args, **kwargs):
        events.append(("deleted", str(path)))
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", renaming)
    monkeypatch.setattr(shutil, "rmtree", deleting)
    return events


def test_a_checkpoint_is_on_the_disk_before_it_counts_and_others_go(make_trainer, start, tmp_path, monkeypatch):  # noqa: F811
    events = watch_disk(monkeypatch)
    make_trainer(str(start), **{**OPTIONS, "max_steps": 2, "save_total_limit": 1}).train()
    new = tmp_path / "checkpoint-2"
    marked = events.index(("renamed", str(new / MARK)))
    before = {path for event, path in events[:marked] if event == "on the disk"}
    assert {str(path) for path in new.rglob("*") if path.name != MARK} | {str(new), str(tmp_path)} <= before
    deleted = events.index(("deleted", str(tmp_path / "checkpoint-1")))
    after_mark = [path for event, path in events[marked:deleted] if event == "on the disk"]
    assert str(new) in after_mark  # so is the mark
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert find_fault(new) is None


def test_older_checkpoints_stay_until_the_new_one_counts(make_trainer, start, tmp_path, monkeypatch):  # noqa: F811
    """Interrupted while the second one is written, with a limit of one."""
    mark = checkpoints.mark_complete

    def interrupted(checkpoint):
        if checkpoint.name == "checkpoint-2":
            raise KeyboardInterrupt
        mark(checkpoint)

    monkeypatch.setattr(checkpoints, "mark_complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(str(start), **{**OPTIONS, "save_total_limit": 1}).train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert find_fault(tmp_path / "checkpoint-1") is None


def make_checkpoints(directory: Path, **steps: bool) -> None:
    for step, complete in steps.items():
        path = directory / f"checkpoint-{step.removeprefix('s')}"
        path.mkdir()
        (path / "trainer_state.json").write_text("{}")
        if complete:
            (path / MARK).touch()


def names(directory: Path) -> list[str]:
    return sorted(path.name.removeprefix("checkpoint-") for path in directory.glob("checkpoint-*"))


def test_rotation_deletes_what_does_not_count_first(tmp_path):
    """After a run went back from 6 to 2, and has written 3."""
    make_checkpoints(tmp_path, s1=True, s2=True, s3=True, s4=False, s6=False)
    (tmp_path / "checkpoint-best").mkdir()
    rotate(tmp_path, None, [])
    rotate(tmp_path, 0, [])
    assert len(names(tmp_path)) == 6
    rotate(tmp_path, 3, [tmp_path / "checkpoint-3"])
    assert names(tmp_path) == ["1", "2", "3", "best"]
    rotate(tmp_path, 2, [tmp_path / "checkpoint-3", str(tmp_path / "checkpoint-1")])
    assert names(tmp_path) == ["1", "3", "best"]
    rotate(tmp_path, 1, [tmp_path / "checkpoint-3", str(tmp_path / "checkpoint-1"), None])  # both must stay
    assert names(tmp_path) == ["1", "3", "best"]
    rotate(tmp_path, 1, [tmp_path / "checkpoint-3"])
    assert names(tmp_path) == ["3", "best"]


# ---------------------------------------------------------------------------------------------- one at a time


HOLD = """
import fcntl, os, signal, sys
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
os.write(lock, b"process 7 on another-host")
print("locked", flush=True)
signal.pause()
"""


def test_a_second_training_in_a_directory_is_refused(make_trainer, tmp_path):
    """While the first one lives. Killed, it leaves a lock file that stops nobody."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / LOCK)], stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout.readline() == b"locked\n"
            trainer = make_trainer(max_steps=1)
            message = rf"Another training is going on in {tmp_path} \(process 7 on another-host\). Choose another"
            with pytest.raises(ValueError, match=message) as error:
                trainer.train()
            assert "\n" not in str(error.value) and not list(tmp_path.glob("checkpoint-*"))
        finally:
            first.kill()
    assert (tmp_path / LOCK).exists()
    trainer.train()
    assert trainer.state.global_step == 1 and not (tmp_path / LOCK).exists()


def test_a_worker_that_outlives_a_training_holds_no_lock(tmp_path):
    """A worker of a data loader, say: a copy of the process, with all of its open files."""
    with only_training_in(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        other = os.open(tmp_path / LOCK, os.O_RDWR)
        reading, writing = os.pipe()
        worker = os.fork()
        if worker == 0:
            os.write(writing, b"x")
            signal.pause()
        os.read(reading, 1)  # it is there
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(other)
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_lock_is_lifted_after_an_error_and_can_be_taken_again(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), only_training_in(tmp_path / "new"):
            assert (tmp_path / "new" / LOCK).exists()
            with pytest.raises(ValueError, match="Another training"), only_training_in(tmp_path / "new"):
                pass
            raise ZeroDivisionError
    assert not (tmp_path / "new" / LOCK).exists()


def test_a_file_system_without_locks_is_warned_of(make_trainer, tmp_path, monkeypatch, caplog):
    def no_locks(*args):
        raise OSError(95, "Operation not supported")

    trainer = make_trainer(max_steps=1)  # the warning is accelerate's, which begins with the trainer
    monkeypatch.setattr(checkpoints.fcntl, "flock", no_locks)
    with only_training_in(tmp_path):
        pass
    assert "cannot be locked" in caplog.text and trainer.accelerator is not None


def test_a_file_of_another_process_may_go_while_all_are_put_on_the_disk(tmp_path, monkeypatch):
    """A name that is listed and not there any more, as that of a temporary file. The file itself is put on the disk."""
    (tmp_path / "rollout_1.pt").write_bytes(b"whole")
    (tmp_path / ".tmp123").symlink_to(tmp_path / "gone")
    synchronized, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synchronized.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    checkpoints.make_durable(tmp_path)
    assert set(synchronized) == {
        str(path.resolve()) for path in (tmp_path / "rollout_1.pt", tmp_path, tmp_path.parent)
    }
