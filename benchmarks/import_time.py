"""
How long `import trl_diffusion` takes beside `import trl`, in fresh processes that take turns.

    python benchmarks/import_time.py --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-W", "error", "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    names = ("trl", "trl_diffusion")
    for name in names:
        seconds(f"import {name}")  # writes the byte code
    times = {name: [] for name in names}
    for _ in range(args.repeats):
        for name in names:
            times[name].append(seconds(f"import {name}"))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name in names:
        print(f"{name:15}{medians[name]:.3f} s ({min(times[name]):.3f} - {max(times[name]):.3f})")
    if args.json:
        print(json.dumps({"trl_diffusion_vs_trl": round(medians["trl_diffusion"] / medians["trl"], 3)}))


if __name__ == "__main__":
    main()
