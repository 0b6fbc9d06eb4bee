"""Files of checkpoints: which checkpoints are complete, which are damaged, which are deleted, and which process may write."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, cast

from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME, TRAINER_STATE_NAME

from ..utils import write_text


try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]


logger = get_logger(__name__)

_open_locks: set[int] = set()


def _close_inherited_locks() -> None:
    while _open_locks:
        os.close(_open_locks.pop())


if fcntl is not None:
    # Otherwise a copy of the process, such as a worker of a data loader, would hold the lock after this process ends.
    os.register_at_fork(after_in_child=_close_inherited_locks)

Engine = Literal["plain", "deepspeed", "fsdp"]

MARK = "checkpoint_complete"
LOCK = "_training.lock"  # uploads of the directory skip names that begin with `_`
# Files that resuming reads. Others in a checkpoint, such as its model card, may change.
_STATE = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".metadata")


def step_of(checkpoint: str | Path) -> int:
    """The optimizer step of a checkpoint, read from its name."""
    return int(Path(checkpoint).name.split("-")[1])


def checkpoints_in(run_dir: str | Path) -> list[Path]:
    """The checkpoints in a directory, complete or not, in the order of their steps."""
    found = [path for path in Path(run_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def make_durable(directory: str | Path) -> None:
    """Waits until all files of a directory are on the disk, and not only in the cache of the operating system. Temporary files of other
    processes, which still write theirs, may go in the meantime."""
    for path in [*Path(directory).rglob("*"), Path(directory), Path(directory).parent]:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def mark_complete(checkpoint: str | Path) -> None:
    """Marks a checkpoint as complete, with the sizes of its files. Checkpoints without a mark do not count."""
    checkpoint = Path(checkpoint)
    files = [path for path in checkpoint.rglob("*") if path.suffix in _STATE or path.name == TRAINER_STATE_NAME]
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in sorted(files) if path.is_file()}
    write_text(checkpoint / MARK, json.dumps({"files": sizes}, indent=2) + "\n")


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint is marked as complete."""
    return (Path(checkpoint) / MARK).is_file()


def unmark_later(run_dir: str | Path, step: int) -> None:
    """Removes the marks of later checkpoints, so that they do not count. They belong to a previous run: this run started from
    an earlier checkpoint or from the beginning, and now has a checkpoint of its own."""
    for checkpoint in checkpoints_in(run_dir):
        if step_of(checkpoint) > step:
            (checkpoint / MARK).unlink(missing_ok=True)


def find_fault(checkpoint: str | Path, engine: Engine = "plain") -> str | None:
    """
    Why training cannot continue from a checkpoint. `None` if it can. Only headers and sizes of files are checked.

    Args:
        checkpoint (`str` or `Path`): its directory.
        engine (`str`, *optional*, defaults to `"plain"`): the engine that wrote it: torch alone or DDP (`"plain"`),
            `"deepspeed"` or `"fsdp"`.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such directory"
    state = checkpoint / TRAINER_STATE_NAME
    if not state.is_file():
        return f"{state.name} is missing"
    for fault in (_differs_from_mark(checkpoint), _damage(checkpoint), _missing_state(checkpoint, engine)):
        if fault is not None:
            return fault
    return None


def _differs_from_mark(checkpoint: Path) -> str | None:
    mark = checkpoint / MARK
    if not mark.is_file() or not mark.stat().st_size:
        return None
    try:
        sizes = json.loads(mark.read_text())["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MARK} is damaged"
    for name, size in sizes:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not the {size} that were written"
    return None


def _damage(checkpoint: Path) -> str | None:
    """The first damaged file of a checkpoint."""
    for path in sorted(checkpoint.iterdir()):
        if path.name == TRAINER_STATE_NAME:
            try:
                if not isinstance(json.loads(path.read_text(encoding="utf-8"))["global_step"], int):
                    return f"{path.name} is damaged (its `global_step` is not a number)"
            except (ValueError, KeyError, TypeError) as error:
                return f"{path.name} is damaged ({type(error).__name__}: {error})"
        elif path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                return f"{path.name} is damaged ({error})"
        elif path.suffix in (".pt", ".pth", ".bin") and path.is_file() and not zipfile.is_zipfile(path):
            return f"{path.name} is damaged (its end is not that of a file of torch)"
    return None


def _missing_state(checkpoint: Path, engine: Engine) -> str | None:
    """Missing optimizer, scheduler and random state, without which transformers would continue."""
    if not any(checkpoint.glob("rng_state*.pth")):
        return "rng_state.pth is missing"
    if engine == "deepspeed":  # optimizer and scheduler are in the directory that `latest` names
        latest = checkpoint / "latest"
        if not latest.is_file() or not (checkpoint / latest.read_text().strip()).is_dir():
            return "the directory that `latest` names, with DeepSpeed's optimizer, is missing"
        return None
    optimizer = OPTIMIZER_NAME
    if engine == "fsdp":
        optimizer = OPTIMIZER_NAME_BIN
        found = any(checkpoint.glob(f"{Path(optimizer).stem}_*/")) or (checkpoint / optimizer).is_file()
    else:
        found = (checkpoint / optimizer).is_file()
    if not found:
        return f"{optimizer} is missing"
    return None if (checkpoint / SCHEDULER_NAME).is_file() else f"{SCHEDULER_NAME} is missing"


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """
    The newest complete checkpoint of a run.

    Args:
        output_dir (`str` or `Path`): the run's directory.

    Returns:
        Path of the newest checkpoint that is marked as complete. If none is marked, path of the newest one that another
        program wrote. `None` if there is none.
    """
    found = _candidates(output_dir)
    return str(found[-1]) if found else None


def _candidates(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints, the newest last."""
    found = checkpoints_in(output_dir)
    complete = [path for path in found if is_complete(path)]
    # A rollout without a mark: a checkpoint of ours that is not complete, or does not count any more.
    foreign = [path for path in found if (path / TRAINER_STATE_NAME).exists() and not any(path.glob("rollout_*.pt"))]
    return complete or foreign


def last_usable_checkpoint(output_dir: str | Path, engine: Engine = "plain") -> Path | None:
    """
    The newest checkpoint from which training can continue. Warns if a newer one is damaged.

    Args:
        output_dir (`str` or `Path`): the run's directory.
        engine (`str`, *optional*, defaults to `"plain"`): see [`find_fault`].

    Raises:
        ValueError: if there are checkpoints, but training can continue from none of them.
    """
    faults: list[str] = []
    for checkpoint in reversed(_candidates(output_dir)):
        fault = find_fault(checkpoint, engine)
        if fault is None:
            for damaged in faults:
                logger.warning(f"{damaged}. Training goes on from the older {checkpoint} instead.")
            return checkpoint
        faults.append(f"{checkpoint} cannot be resumed: {fault}")
    if faults:
        raise ValueError(
            f"{'; '.join(faults)}. Restore what is missing, or move these checkpoints away, so that training starts anew."
        )
    return None


def rotate(run_dir: str | Path, limit: int | None, keep: list[str | Path | None]) -> None:
    """
    Deletes checkpoints until `limit` are left: first the incomplete ones, then the oldest.

    Args:
        run_dir (`str` or `Path`): directory of the checkpoints.
        limit (`int`, *optional*): largest number of checkpoints. No limit if `None` or not positive.
        keep (`list[str | Path | None]`): checkpoints that are not deleted.
    """
    if limit is None or limit <= 0:
        return
    kept = {Path(path).resolve() for path in keep if path is not None}
    found = sorted(checkpoints_in(run_dir), key=lambda path: (is_complete(path), step_of(path)))
    free = [path for path in found if path.resolve() not in kept]
    for checkpoint in free[: max(len(found) - max(limit, len(kept)), 0)]:
        (checkpoint / MARK).unlink(missing_ok=True)  # first, because a partly deleted checkpoint must not count
        shutil.rmtree(checkpoint, ignore_errors=True)


@contextmanager
def only_training_in(output_dir: str | Path) -> Iterator[None]:
    """
    Context in which no other training can begin in this directory, neither on this machine nor on another one with the
    same file system.

    The operating system releases the lock when the process ends, for whatever reason. Some network file systems have no
    locks. There is then a warning, and no protection.

    Raises:
        ValueError: if another training uses the directory.
    """
    if fcntl is None:
        yield
        return
    path = Path(output_dir) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(path)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                path.unlink()
            _open_locks.discard(descriptor)
            os.close(descriptor)


def check_start(args: TrainingArguments) -> None:
    """
    Checks what can be known of the beginning of training before weights are loaded.

    Args:
        args ([`~transformers.TrainingArguments`]): settings, with `output_dir` and `resume_from_checkpoint`.

    Raises:
        ValueError: if another training uses the directory, or training cannot continue from the checkpoint.
    """
    run_dir, wanted, engine = Path(str(args.output_dir)), args.resume_from_checkpoint, _engine(args)
    if args.process_index == 0 and (run_dir / LOCK).exists():
        with only_training_in(run_dir):
            pass
    if str(wanted).lower() == "true":  # as text, of a command line
        last_usable_checkpoint(run_dir, engine)
    elif wanted:
        fault = find_fault(wanted, engine)
        if fault is not None:
            raise ValueError(
                f"{wanted} cannot be resumed: {fault}. Restore it, or name another `resume_from_checkpoint`."
            )


def _engine(args: TrainingArguments) -> Engine:
    """The engine that settings and `accelerate launch` ask for."""
    for engine, option in (("deepspeed", args.deepspeed), ("fsdp", args.fsdp)):
        if option or os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "").lower() in ("1", "true"):
            return cast(Engine, engine)
    return "plain"


def _lock(path: Path) -> int | None:
    """Locks a file, and writes the owner into it. `None` if the file system has no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise ValueError(
                f"Another training is going on in {path.parent} ({holder}). Choose another `output_dir`, or wait for its end."
            ) from None
        except OSError as error:
            os.close(descriptor)
            logger.warning(
                f"{path} cannot be locked ({error}): take care that no other training runs in {path.parent}."
            )
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # the previous owner has just deleted this file
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _open_locks.add(descriptor)
    return descriptor
