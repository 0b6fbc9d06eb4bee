"""
Follows pages of the documentation literally: runs the commands of their shell blocks, in order, in a copy of the checkout.

    python docs/follow.py README.md docs/howto/offline.md
    python docs/follow.py --data DIRECTORY          # all pages; data/ stands for files that they leave to you
    python docs/follow.py --stand_in GSAI-ML/LLaDA-8B-Instruct=DIRECTORY --stand_in path/to/fast_dllm_v2=DIRECTORY

A command that was run before is not run again. Those that need a model from the hub, a login, or a file that is not there are
named and left out. They find a fresh environment, into which the `pip install` of the README installs: begin with that page.
A checkpoint that stands in for a model has it planned for, which reads nothing but the config.
Ends with a table, and with code 1 if a command failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
# What a machine without a network and a large GPU does not have.
NEEDS = {
    r"\b(GSAI-ML|Dream-org|Efficient-Large-Model|JetLM)/": "a model from the hub",
    r"\boutputs/llada\b|recipes/(llada|dream|fast_dllm_v2|sdar)\w*\.yaml": "a model from the hub",
    r"^(hf|curl|for|done)\b": "a network",
}


def commands(page: str) -> list[str]:
    """The commands of a page's shell blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in found.splitlines())
    return [re.sub(r"\s+", " ", line) for line in lines if line and not line.startswith("#")]


def reason(command: str, directory: Path) -> str | None:
    """Why a command cannot be run here, if so."""
    planned = re.search(r"\bplan (\S+)", command)
    if planned and (directory / planned[1]).is_dir():  # nothing but the config of this model is read
        return None
    for pattern, need in NEEDS.items():
        if re.search(pattern, command):
            return f"needs {need}"
    for path in re.findall(r"\S+/\S+\.jsonl|(?<=--data_dir )\S+|\bpath/to/\S+", command):
        if not (directory / path).exists():
            return f"needs {path}"
    return None


def follow(lines: list[str], directory: Path, only_list: bool) -> list[tuple[str, str]]:
    """Runs commands in one shell, as somebody would who types them. Returns each with what became of it."""
    outcomes = [(line, reason(line, directory) or ("to be run" if only_list else "")) for line in lines]
    results = directory / "results.txt"
    results.unlink(missing_ok=True)
    script = "".join(
        f"echo {shlex.quote('$ ' + line)}; SECONDS=0; {line}\necho $? $SECONDS >> {results}\n"
        for line, outcome in outcomes
        if not outcome
    )
    fresh = str(directory.parent / "environment" / "bin")
    environment = {**os.environ, "PATH": os.pathsep.join([fresh, os.environ["PATH"]])}
    subprocess.run(["bash", "-c", script], cwd=directory, check=False, env=environment)
    ends = iter(results.read_text().splitlines() if results.exists() else [])
    found = []
    for line, outcome in outcomes:
        if not outcome:
            code, seconds = next(ends, "1 0").split()
            outcome = f"{'done' if code == '0' else f'FAILED with code {code}'} in {seconds} s"
        found.append((line, outcome))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="files (default: the README and all pages)")
    parser.add_argument("--data", type=Path, help="directory with gsm8k/, sudoku/ and countdown/")
    parser.add_argument(
        "--stand_in", action="append", default=[], metavar="NAME=DIRECTORY", help="what a name stands for"
    )
    parser.add_argument("--list", action="store_true", help="say what would be run")
    args = parser.parse_args()
    found = [page.relative_to(ROOT) for page in sorted((ROOT / "docs").rglob("*.md"))]
    pages = args.pages or ["README.md", *(str(page) for page in found if "node_modules" not in page.parts)]
    rows, seen, failed = [], set(), False
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "checkout"
        left_out = shutil.ignore_patterns(".git", ".venv*", "node_modules", "outputs", "site")
        shutil.copytree(ROOT, directory, symlinks=True, ignore=left_out)
        if not args.list:
            subprocess.run([sys.executable, "-m", "venv", str(directory.parent / "environment")], check=True)
        if args.data:
            (directory / "data").symlink_to(args.data.resolve())
        for name, _, target in (stand_in.partition("=") for stand_in in args.stand_in):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).symlink_to(Path(target).resolve())
        for page in pages:
            fresh = [command for command in commands(page) if command not in seen]
            seen.update(fresh)
            for command, outcome in follow(fresh, directory, args.list):
                rows.append((page, command, outcome))
                failed |= outcome.startswith("FAILED")
    for page, command, outcome in rows:
        print(f"{page:26} {outcome:28} {command[:120]}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
