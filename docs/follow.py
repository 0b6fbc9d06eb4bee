"""
Follows pages of the documentation literally: runs the commands of their shell blocks and the code of their Python blocks, in
order, in a copy of the checkout, or with the wheel alone in an empty directory.

    python docs/follow.py README.md docs/howto/offline.md
    python docs/follow.py --data DIRECTORY          # all pages; data/ stands for files that they leave to you
    python docs/follow.py --wheel                   # what needs a checkout is left out
    python docs/follow.py --stand_in path/to/fast_dllm_v2=DIRECTORY

Each step is checked for what it claims, and not for its exit code alone: a training must have moved the weights, with losses and
rewards that are finite and not constant; it must solve more than before, or no less if it goes on from a trained policy;
`solve rate A% -> B%` on a page must be what a command of this page prints, within five points; what a page says that its Python
blocks print (prints `...`) must be printed; `outputs/...` on a page must be there afterwards. A Python block below
`<!-- saved as FILE -->` is also put at the end of this file, for the commands after it.

A command that was run before is not run again. Those that need a model from the hub, a login, or a file that is not there are
named and left out. They find a fresh environment, into which the `pip install` of the README installs: begin with that page.
Models that the package knows are planned for without the hub.
Ends with a table, and with code 1 if a step failed.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch


ROOT = Path(__file__).resolve().parents[1]
UNRUNNABLE = "<!-- needs a 7B model -->\n"  # before a Python block that is not run
SAVED = r"<!-- saved as (\S+) -->\n"  # before a Python block that the page has one save
# What a machine without a network and a large GPU does not have.
NEEDS = {
    r"\b(GSAI-ML|Dream-org|Efficient-Large-Model|JetLM|Qwen)/": "a model from the hub",
    r"\boutputs/llada\b|\b(llada|dream|fast_dllm_v2|sdar)\w*\.yaml|--config (llada|dream|fast_dllm|sdar)": (
        "a model from the hub"
    ),
    r"\b(llm-)?smollm2": "a package from the index",
    r"^(sbatch|srun|scontrol|squeue)\b": "a Slurm cluster",
    r"^(hf|for|done|git|cd)\b|^curl (?!.*http://127\.0\.0\.1)": "a network",
    r"^trl-diffusion compare (--study|--output_dir)": "hours",
}
A_CHECKOUT = r"^(make|git|cd)\b|\brecipes/|constraints\.txt|\bbenchmarks/"
NO_WEIGHTS = r"^trl-diffusion (plan|doctor)\b"  # the package knows the sizes of the models on the pages
SOLVE_RATE = r"solve rate ([\d.]+)% -> ([\d.]+)%"


class Step(NamedTuple):
    """A command, or the code of a Python block."""

    language: str
    text: str
    file: str = ""  # where a Python block is saved, too

    @property
    def title(self) -> str:
        return self.text if self.language == "bash" else f"Python: {self.text.strip().splitlines()[-1].strip()}"


def steps(page: str) -> list[Step]:
    """What a page has one do, in order. Python blocks that need a large model are left out."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for mark, file, language, code in re.findall(
        rf"({re.escape(UNRUNNABLE)})?(?:{SAVED})?^```(bash|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE
    ):
        if language == "python":
            found += [] if mark else [Step("python", code, file)]
            continue
        lines = (re.sub(r"\s+#.*", "", line).strip() for line in code.replace("\\\n", " ").splitlines())
        found += [Step("bash", re.sub(r"\s+", " ", line)) for line in lines if line and not line.startswith("#")]
    return found


def commands(page: str) -> list[str]:
    """The commands of a page's shell blocks."""
    return [step.text for step in steps(page) if step.language == "bash"]


def pages() -> list[str]:
    """The README, and the pages in the order of the site's navigation."""
    named = re.findall(r": ([\w/]+\.md)$", _navigation(), re.MULTILINE)
    return [
        "README.md",
        *(f"docs/{name}" for name in named if not name.startswith("notebooks/")),
    ]  # they have their own test


def _navigation() -> str:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    return text.replace("benchmarks/RESULTS.md", "")  # which lies elsewhere, and has no blocks


def reason(command: str, directory: Path, wheel: bool = False) -> str | None:
    """Why a command cannot be run here, if so."""
    if wheel and re.search(A_CHECKOUT, command):
        return "needs a checkout"
    if re.search(NO_WEIGHTS, command):
        return None
    for pattern, need in NEEDS.items():
        if re.search(pattern, command):
            return f"needs {need}"
    for path in re.findall(r"\S+/\S+\.jsonl|(?<=--data_dir )\S+|\bpath/to/\S+", command):
        if not path.startswith("outputs/") and not (directory / path).exists():  # the page has these written
            return f"needs {path}"
    return None


# ------------------------------------------------------------------------------------------------ what steps claim


def check_log(log: list[dict[str, Any]]) -> None:
    """
    Checks that a training has learnt something, from the log of its trainer.

    Raises:
        ValueError: if nothing was logged, a loss or a reward is not finite, no update had a gradient, or rewards or losses are
            all the same.
    """
    rows = [entry for entry in log if "loss" in entry and "grad_norm" in entry]
    if not rows:
        raise ValueError("no update is in the log; set `logging_steps`")
    for name in ("loss", "reward"):
        values = [entry[name] for entry in rows if name in entry]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{name} is not finite: {values}")
    if not any(entry["grad_norm"] for entry in rows):
        raise ValueError("no update had a gradient")
    if all(entry.get("reward_std", 1.0) == 0 for entry in rows):
        raise ValueError("all responses to a prompt have the same reward")
    if len(rows) > 1 and len({(entry["loss"], entry.get("reward")) for entry in rows}) == 1:
        raise ValueError("loss and reward are constant")


def check_results(results: dict[str, Any]) -> None:
    """
    Checks that a training has gained something, from its `results.json`. One that goes on from a trained policy has little left to
    gain: it must not have lost more than its interval allows.

    Raises:
        ValueError: if the policy is no better than before, or worse after it went on.
    """
    before, after = results.get("solve_rate_before"), results.get("solve_rate_after")
    if before is None or after is None:
        return
    goes_on = "--model_name_or_path outputs/" in results.get("command", "")
    if not (results["interval_after"][1] >= before if goes_on else after > before):
        raise ValueError(f"the solve rate is {after:.1%} after training and {before:.1%} before")


@contextmanager
def watched_trainers() -> Iterator[list]:
    """Inside, a trainer that learns nothing is an error. Gives the list of the trainers that have trained."""
    from trl_diffusion import DiffusionSFTTrainer, DTRPOTrainer

    trained: list = []

    def watching(train):
        def watched(self, *args, **kwargs):
            before = {
                name: value.detach().clone() for name, value in self.model.named_parameters() if value.requires_grad
            }
            result = train(self, *args, **kwargs)
            now = dict(self.model.named_parameters())
            if all((now[name] == value).all() for name, value in before.items()):
                raise ValueError("training has moved no weight")
            check_log(self.state.log_history)
            trained.append(self)
            return result

        return watched

    with ExitStack() as stack:
        for kind in (DTRPOTrainer, DiffusionSFTTrainer):
            stack.enter_context(patch.object(kind, "train", watching(kind.train)))
        yield trained


def claimed_rates(page: str, printed: str) -> list[str]:
    """Solve rates on a page that no command of it has printed, within five points."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [(float(before), float(after)) for before, after in re.findall(SOLVE_RATE, printed)]
    wrong = []
    for before, after in re.findall(SOLVE_RATE, text):
        if not any(abs(float(before) - one) <= 5 and abs(float(after) - other) <= 5 for one, other in found):
            wrong.append(f"solve rate {before}% -> {after}%")
    return wrong


def claimed_prints(page: str, printed: str) -> list[str]:
    """What a page says that its Python blocks print (prints `...`), and they have not printed."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [claim for claim in re.findall(r"\bprints `([^`]+)`", text) if claim not in printed]


def claimed_files(page: str, directory: Path, left_out: str) -> list[str]:
    """Paths in `outputs` on a page that are not there, although no command that was left out names them."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    named = {path.rstrip("/") for path in re.findall(r"`(outputs/[\w./-]+)`", text)}
    return sorted(path for path in named if path not in left_out and not (directory / path).exists())


# ---------------------------------------------------------------------------------------------------- running steps


class Python:
    """A Python process of the fresh environment that runs the blocks of a page one after another, as one session."""

    def __init__(self, directory: Path, environment: dict[str, str]):
        self.process = subprocess.Popen(
            ["python", str(Path(__file__).resolve()), "--serve"],
            cwd=directory, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, code: str) -> tuple[str, str]:
        """Runs a block. Returns what was wrong with it, or nothing, and what it printed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        wrong, printed = json.loads(answer) if answer else ("the process has ended", "")
        return wrong, printed

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class _Copied(io.StringIO):
    """What is written here goes to stderr, too."""

    def write(self, text: str) -> int:
        sys.stderr.write(text)
        return super().write(text)


def serve() -> None:
    """Runs blocks that come on standard input, each as a line of JSON, and answers with a line: what was wrong, and what they
    printed. This goes to stderr, too."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    names: dict[str, Any] = {}
    for line in sys.stdin:
        wrong, printed = "", _Copied()
        try:
            with watched_trainers(), redirect_stdout(printed):
                exec(compile(json.loads(line), "block", "exec"), names)
        except Exception as error:
            traceback.print_exc()
            wrong = f"{type(error).__name__}: {error}"
        print(json.dumps([wrong, printed.getvalue()]), file=answers, flush=True)


class Shell:
    """A shell that takes the commands of a page one after another, so that later ones know its variables and its directory."""

    END = "end of the command, code "

    def __init__(self, directory: Path, environment: dict[str, str]):
        self.directory = directory
        self.process = subprocess.Popen(
            ["bash"], cwd=directory, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, command: str) -> tuple[str, str]:
        """Runs a command. Returns what was wrong with it, or nothing, and what it printed to standard output."""
        assert self.process.stdin is not None and self.process.stdout is not None
        begun, printed = time.time(), []
        self.process.stdin.write(f'{{ {command}\n}} < /dev/null\necho "{self.END}$?"\n')
        self.process.stdin.flush()
        for line in self.process.stdout:
            text, found, code = line.partition(self.END)
            printed.append(text)
            print(text, end="", flush=True)
            if found:
                break
        else:
            return "the shell has ended", "".join(printed)
        if int(code):
            return f"code {int(code)}", "".join(printed)
        return self.wrong_since(begun), "".join(printed)

    def wrong_since(self, begun: float) -> str:
        """What is wrong with the trainings whose files are new, or nothing."""
        try:
            for path in self.directory.glob("outputs/**/*.json"):
                if path.stat().st_mtime < begun or "checkpoint-" in str(path):
                    continue
                if path.name == "trainer_state.json":
                    check_log(json.loads(path.read_text())["log_history"])
                elif path.name == "results.json":
                    check_results(json.loads(path.read_text()))
        except ValueError as error:
            return str(error)
        return ""

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def follow(
    page: str, todo: list[Step], directory: Path, environment: dict[str, str], wheel: bool, printed_by: dict[Step, str]
) -> list[tuple[str, str]]:
    """
    Takes the steps of a page as somebody would who types them. Returns each with what became of it. What a command prints goes into
    `printed_by`, for the pages after this one that have it, too.
    """
    found, shell, python = [], Shell(directory, environment), None
    python_printed = left_out = ""
    for step in todo:
        outcome = reason(step.text, directory, wheel) if step.language == "bash" else None
        if outcome is not None:
            left_out += step.text
        else:
            print(f"$ {step.title}", flush=True)
            begun = time.monotonic()
            if step.language == "bash":
                wrong, printed_by[step] = shell.run(step.text)
            else:
                python = python or Python(directory, environment)
                save(step, directory)
                wrong, printed = python.run(step.text)
                python_printed += printed
            seconds = round(time.monotonic() - begun)
            outcome = f"FAILED in {seconds} s: {wrong}" if wrong else f"done in {seconds} s"
        found.append((step.title, outcome))
    shell.close()
    if python is not None:
        python.close()
        found += [
            ("what the page says", f"FAILED: no block printed `{one}`") for one in claimed_prints(page, python_printed)
        ]
    if all_printed := "".join(printed_by.get(step, "") for step in steps(page)):
        found += [
            ("what the page says", f"FAILED: no command printed `{one}`") for one in claimed_rates(page, all_printed)
        ]
    if not left_out or not wheel:
        found += [
            ("what the page says", f"FAILED: there is no {one}") for one in claimed_files(page, directory, left_out)
        ]
    return found


def save(step: Step, directory: Path) -> None:
    """Puts a block at the end of the file in which the page has one save it."""
    if step.file:
        path = directory / step.file
        path.write_text((path.read_text() if path.exists() else "") + step.text + "\n\n")


def prepare(base: Path, wheel: bool, only_list: bool) -> tuple[Path, dict[str, str]]:
    """The directory in which pages are followed, and the environment of its processes."""
    directory, fresh = base / ("elsewhere" if wheel else "checkout"), base / "environment"
    if wheel:
        directory.mkdir()
    else:
        left_out = shutil.ignore_patterns(".git", ".venv*", "node_modules", "outputs", "site")
        shutil.copytree(ROOT, directory, symlinks=True, ignore=left_out)
    environment = {**os.environ, "PATH": os.pathsep.join([str(fresh / "bin"), os.environ["PATH"]])}
    environment.pop("PYTHONPATH", None)
    if not only_list:
        subprocess.run([sys.executable, "-m", "venv", str(fresh)], check=True)
        if wheel:
            build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(base), str(ROOT)]
            subprocess.run(build, check=True)
            (built,) = base.glob("*.whl")
            limits = ["-c", str(ROOT / "constraints.txt")]
            subprocess.run(
                ["pip", "install", "--quiet", *limits, f"{built}[eval,serve,viz]"], check=True, env=environment
            )
    return directory, environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="files (default: the README and all pages)")
    parser.add_argument("--data", type=Path, help="directory with gsm8k/, sudoku/ and countdown/")
    parser.add_argument(
        "--stand_in", action="append", default=[], metavar="NAME=DIRECTORY", help="what a name stands for"
    )
    parser.add_argument("--wheel", action="store_true", help="install the wheel, and follow in an empty directory")
    parser.add_argument("--list", action="store_true", help="say what would be run")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return 0
    rows: list[tuple[str, str, str]] = []
    seen: set[Step] = set()
    printed_by: dict[Step, str] = {}
    with tempfile.TemporaryDirectory() as name:
        directory, environment = prepare(Path(name), args.wheel, args.list)
        if args.data:
            (directory / "data").symlink_to(args.data.resolve())
        for name, _, target in (stand_in.partition("=") for stand_in in args.stand_in):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).symlink_to(Path(target).resolve())
        for page in args.pages or pages():
            todo = [step for step in steps(page) if step not in seen]
            seen.update(step for step in todo if step.language == "bash")
            if args.list:
                found = [
                    (step.title, (step.language == "bash" and reason(step.text, directory, args.wheel)) or "to be run")
                    for step in todo
                ]
            else:
                found = follow(page, todo, directory, environment, args.wheel, printed_by)
            rows += [(page, *row) for row in found]
    for page, title, outcome in rows:
        print(f"{page:26} {outcome:28} {title[:120]}")
    return int(any(outcome.startswith("FAILED") for _, _, outcome in rows))


if __name__ == "__main__":
    sys.exit(main())
