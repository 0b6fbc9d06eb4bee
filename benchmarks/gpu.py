"""
What only a GPU can show: correctness, costs, rollouts and whole trainer steps on CUDA, with random weights of real shapes.

    python benchmarks/gpu.py --json
    python benchmarks/gpu.py --only training decoding --seconds 300 --json
    python benchmarks/gpu.py --size tiny --json      # every section on small shapes, on a CPU, too
    python benchmarks/gpu.py --device cpu --tiny     # a rehearsal of the table in seconds, in this process

Each section runs in a process of its own with a time limit; what it has measured until then counts, and the others go on.

- `tests`: the tests that need a CUDA device (`pytest -m gpu`).
- `gap`: packed scores beside the log-probabilities recorded while decoding, in nats, by SDPA and by FlexAttention, in float32
  and bfloat16, on a 0.5B-shaped policy; and how many answers are the same alone and in a batch.
- `trainer`: whole `DTRPOTrainer` steps on the embedded policy and on a 1.5B-shaped one.
- `training`: an update of a 7B-shaped policy with LoRA beside autoregressive SFT, block-diffusion SFT, an ELBO with 8 masks and the
  exact trajectory: the steps of `training_cost.py`, under autocast and with gradient checkpointing, as the recipes run.
- `full`: some of these with every weight trained, in bfloat16 (weights, gradients and AdamW's state).
- `attention`: dTRPO's step with SDPA and with FlexAttention, short and long responses, and what a new shape costs.
- `checkpointing`: dTRPO's step with gradient checkpointing on and off, with LoRA and with every weight trained.
- `layers`: an update with LoRA, and a decoded response, with 2, 4, 8 and all layers of the 7B shape.
- `decoding`: rollouts of the 7B-shaped policy beside the loop that Fast-dLLM v2 published, and beside bare forward passes.
- `recipe`: one optimizer step with the options of `recipes/fast_dllm_v2.yaml`, rollout included.
- `plan`: what `python -m trl_diffusion.plan` says about the memory of these. Needs no GPU and runs beside the others.

A table of all rows comes at the end. A value that was measured several times is given as median, smallest and largest. Peaks are those of the allocator
(`torch.cuda.max_memory_allocated`), without the CUDA context. Without a CUDA device only `--size tiny` runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

import torch
from gpu_costs import attention, checkpointing, full, layers, rollouts, training  # beside this file, like the next two
from gpu_sections import gap, plan, recipe, tests, trainer
from gpu_shapes import DEVICE, SIZES, Row, Size, clear


# A function, and the most seconds that it may take.
SECTIONS: dict[str, tuple[Callable[[Size], Iterator[Row]], int]] = {
    "tests": (tests, 100),
    "gap": (gap, 90),
    "trainer": (trainer, 75),
    "training": (training, 100),
    "checkpointing": (checkpointing, 60),
    "layers": (layers, 60),
    "decoding": (rollouts, 100),
    "attention": (attention, 75),
    "recipe": (recipe, 90),
    "full": (full, 45),
    "plan": (plan, 400),
}


TABLE = ("gap", "attention", "checkpointing", "layers", "decoding")  # what `--tiny` fills


# ----------------------------------------------------------------------------------------------------------- runs


def rows_of(name: str, size: Size) -> Iterator[dict]:
    """What a section finds, row by row."""
    function, _ = SECTIONS[name]
    for row, measure in function(size):
        try:
            found = measure()
        except Exception as error:  # the rows after it may be fine
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
            clear()
        yield {"row": row, "found": found}


def run_section(name: str, size: Size) -> None:
    """In a process of its own: prints what is found, a line of JSON for each row."""
    sys.stdin.readline()  # the GPU is another section's until then
    for row in rows_of(name, size):
        print(json.dumps(row), flush=True)


def run_here(names: list[str], size: str) -> Iterator[tuple[str, dict]]:
    """The sections one after another in this process, which has no time limit."""
    for name in names:
        begun = time.perf_counter()
        rows = list(rows_of(name, SIZES[size]))
        yield name, {"status": "done", "seconds": time.perf_counter() - begun, "rows": merged(rows)}


class Section:
    """A section in a process of its own, which imports what it needs and waits for `start`. Rows are read as they come."""

    def __init__(self, name: str, size: str):
        self.name, self.rows = name, []
        self.errors = tempfile.TemporaryFile("w+")
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if name == "plan" else {}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--section", name, "--size", size],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env={**os.environ, **hidden},
            start_new_session=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith('{"row"'):
                self.rows.append(json.loads(line))
                print(f"{self.name}: {line.strip()}", flush=True)

    def start(self) -> Section:
        self.begin = time.perf_counter()
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def result(self, seconds: float) -> dict:
        """What was found, after waiting for this long at most."""
        status = "done"
        try:
            self.process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} seconds"
            self.stop()
        self.reader.join(5)
        found = {"status": status, "seconds": time.perf_counter() - self.begin, "rows": merged(self.rows)}
        if self.process.returncode not in (0, -signal.SIGKILL) or status != "done":
            self.errors.seek(0)
            found["stderr"] = self.errors.read()[-3000:]
            found["status"] = status if status != "done" else f"failed with code {self.process.returncode}"
        return found


def run_all(names: list[str], size: str, seconds: float) -> Iterator[tuple[str, dict]]:
    """The sections one after another, in the order given; the next one imports meanwhile. `plan` runs beside them. None is
    left behind when this ends early."""
    running: list[Section] = []
    try:
        yield from run_in_turn(names, size, seconds, running)
    finally:
        for section in running:
            section.stop()


def run_in_turn(names: list[str], size: str, seconds: float, running: list[Section]) -> Iterator[tuple[str, dict]]:
    def section_of(name: str) -> Section:
        running.append(Section(name, size))
        return running[-1]

    end, patience = time.perf_counter() + seconds, 1 if DEVICE == "cuda" else 10
    planning = section_of("plan").start() if "plan" in names else None
    waiting = [name for name in names if name != "plan"]
    if DEVICE == "cpu" and size != "tiny":
        yield from ((name, {"status": "skipped: needs a CUDA device; try `--size tiny`"}) for name in waiting)
        waiting = []
    coming = section_of(waiting[0]) if waiting else None
    for name, following in zip_longest(waiting, waiting[1:]):
        if end - time.perf_counter() < 10:
            yield name, {"status": "skipped: no time was left"}
            continue
        section = coming.start()
        coming = section_of(following) if following else None
        yield name, section.result(min(end - time.perf_counter(), patience * SECTIONS[name][1]))
    if planning:
        yield "plan", planning.result(end - time.perf_counter())


def merged(rows: list[dict]) -> dict[str, dict]:
    """Rows of the same name as one: median, smallest and largest of their numbers."""
    by_name: dict[str, list[dict]] = {}
    for row in rows:
        by_name.setdefault(row["row"], []).append(row["found"])
    return {name: found[0] if len(found) == 1 else together(found) for name, found in by_name.items()}


def together(found: list[dict]) -> dict:
    whole = {}
    for key in dict.fromkeys(key for values in found for key in values):
        values = [row[key] for row in found if key in row]
        if all(isinstance(value, int | float) for value in values):
            spread = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
                "count": len(values),
            }
            whole[key] = rounded(spread) if spread["min"] != spread["max"] else values[0]
        else:
            whole[key] = values[0]
    return whole


def rounded(value):
    """Floats with five significant digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def table(results: dict) -> str:
    """All rows in Markdown, without first calls: the medians of what was measured several times."""
    lines = ["| section | row | found |", "|---|---|---|"]
    for section, found in results["sections"].items():
        for row, values in found.get("rows", {}).items():
            if not row.endswith("first call"):
                said = ", ".join(f"{name} {_shown(value)}" for name, value in values.items())
                lines.append(f"| {section} | {row} | {said} |")
    return "\n".join(lines)


def _shown(value) -> str:
    if isinstance(value, dict):
        return _shown(value["median"]) if "median" in value else json.dumps(rounded(value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> dict:
    about = {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **{name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "peft")},
    }
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "gpu": properties.name,
            "gpu_gib": properties.total_memory / 2**30,
            "cudnn": torch.backends.cudnn.version(),
        }
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION", help="default: all of them")
    parser.add_argument("--size", choices=list(SIZES), default="7b")
    parser.add_argument(
        "--tiny", action="store_true", help=f"tiny shapes, in this process; default: {', '.join(TABLE)}"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default=DEVICE, help="default: a GPU if there is one")
    parser.add_argument("--seconds", type=float, default=480, help="time for everything; what is left over is skipped")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object on the last line")
    parser.add_argument("--output", type=Path, help="file for that object, rewritten after each section")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device != DEVICE:
        if args.device == "cuda":
            parser.error("there is no CUDA device: --device cpu --tiny rehearses the table")
        # What was imported has looked for a device already.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if args.section:
        run_section(args.section, SIZES[args.size])
        return
    args.size = "tiny" if args.tiny else args.size
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and stop the sections
    results: dict = {"machine": machine(), "size": {"name": args.size, **asdict(SIZES[args.size])}, "sections": {}}
    names = args.only or list(TABLE if args.tiny else SECTIONS)
    for name, found in run_here(names, args.size) if args.tiny else run_all(names, args.size, args.seconds):
        results["sections"][name] = found
        print(f"{name}: {found['status']} ({found.get('seconds', 0):.0f} s)", flush=True)
        if args.output:
            args.output.write_text(json.dumps(rounded(results)))
    print(table(results))
    if args.json:
        print(json.dumps(rounded(results)))


if __name__ == "__main__":
    main()
