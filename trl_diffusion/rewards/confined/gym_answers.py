"""
The process that scores answers with the verifiers of reasoning-gym, started by `rewards/gym.py`: a program, not a module to import.

Some of these verifiers run an answer as Python (`eval`, or sympy's `parse_expr`, which does the same). Such answers have a process each,
which is confined as the sandbox confines a program, and the kernel ends it at its limits. What such an answer does to its own
process may change its own score, and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import socket
import sys
from typing import Any


def score(dataset: Any, answer: str, entry: dict[str, Any]) -> float:
    """What the verifier gives for an answer; 0 if it fails."""
    try:
        value = float(dataset.score_answer(answer, entry))
    except (Exception, SystemExit):
        return 0.0
    return value if math.isfinite(value) else 0.0


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    task = json.loads(sys.argv[2])
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from confine import ConfinementError, confine
    from math_answers import STARTED, limit, serve

    sys.path.pop(0)
    from reasoning_gym import create_dataset

    trainer = socket.socket(fileno=0)
    dataset = create_dataset(task["name"], seed=0, size=1, **task["options"])
    entry = dataset[0]
    score(dataset, str(entry["answer"]), entry)  # what is imported and prepared on the way is so for all

    def handle(connection: socket.socket) -> None:
        with connection.makefile("rb") as file:
            jobs = pickle.load(file)  # of the trainer, which has made the questions
        out, limits = connection.fileno(), (task["cpu_time"], task["wall_time"], task["memory"])
        limit(*limits)
        if task["runs_answers"]:  # a single one, as no limit can be set after this
            kernel = {"cpu_time": math.ceil(task["cpu_time"]) + 1, "memory": task["memory"], "file_size": 0}
            try:
                confine(kernel, task["readable"], None)
            except ConfinementError as error:
                os.write(out, STARTED + f"!{error}".encode())
                return
        os.write(out, STARTED)
        for number, (answer, entry) in enumerate(jobs):
            if number:
                limit(*limits)
            os.write(out, f"{score(dataset, answer, entry)!r}\n".encode())

    serve(trainer, handle)


if __name__ == "__main__":
    main()
