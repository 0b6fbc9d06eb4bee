"""What both confined processes do first: read their job, confine themselves, and say so."""

from __future__ import annotations

import json
import os
import sys
import traceback

from confine import ConfinementError, confine


def start() -> dict:
    """
    Reads the job from standard input, confines the process and reports `ready` (or what went wrong) to the trainer.

    Returns:
        `dict`: the job, as JSON had it.
    """
    job = json.loads(sys.stdin.buffer.read())
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    report = b"ready"
    try:
        confine(job["limits"], job["readable"], job["working_directory"])
    except ConfinementError as error:
        report = str(error).encode()
    except Exception:
        report = traceback.format_exc().encode()
    os.write(job["ready_fd"], report)
    os.close(job["ready_fd"])
    if report != b"ready":
        os._exit(1)
    return job
