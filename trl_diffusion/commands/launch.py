"""
`accelerate launch`, which takes what is left out from its defaults and does not list it. A single process takes the place of the
launcher, so that Ctrl-C and its exit code are its own. Several processes end with one exit code.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from argparse import Namespace

from accelerate.commands import launch
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..errors import SAID


def become(args: Namespace) -> None:
    """Runs the single process of a launch in place of this one."""
    command, environment = prepare_simple_launcher_cmd_env(args)
    shutil.rmtree(environment.pop(SAID), ignore_errors=True)  # there is no other process
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)


def main() -> None:
    """
    Launches.

    Raises:
        SystemExit: with the exit code of the first process that has failed.
    """
    launch.simple_launcher = become
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as said:
            os.environ[SAID] = said
            launch.main()
    except SignalException as error:  # the processes have got the signal, and said what is kept
        raise SystemExit(128 + error.sigval) from None
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"error: process {failure.local_rank} was ended by {name}, as by a lack of memory.", file=sys.stderr)
            raise SystemExit(128 - failure.exitcode) from None
        raise SystemExit(failure.exitcode) from None  # the process has said what is wrong


if __name__ == "__main__":
    main()
