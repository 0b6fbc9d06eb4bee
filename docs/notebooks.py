"""
The notebooks: runs them and stores their outputs, and makes pages of the site of them.

    python docs/notebooks.py                           # all; a few minutes
    python docs/notebooks.py notebooks/lora_sudoku.ipynb

A cell with the tag `varies` prints numbers that differ between machines, such as those of a trained policy.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What a kernel gets, so that it shows the outputs of the cells and no bars or remarks of libraries.
ENVIRONMENT = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
}


def source_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def outputs_of(cell: dict[str, Any]) -> tuple[str, list[bytes]]:
    """The text that a code cell prints, and its pictures (PNG)."""
    texts, pictures = [], []
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        if "image/png" in data:
            pictures.append(base64.b64decode("".join(data["image/png"])))
        else:
            texts.append("".join(output.get("text") or data.get("text/plain", "")))
    return "".join(texts), pictures


# ----------------------------------------------------------------------------------------------------------------- run


def run(notebook: Any, directory: Path, manager: Any = None, timeout: float | None = None) -> None:
    """
    Runs a notebook and puts the outputs into its cells.

    Args:
        notebook (`nbformat.NotebookNode`): the notebook.
        directory (`Path`): where it runs, and writes what it writes.
        manager (`jupyter_client.KernelManager`, *optional*): a kernel that is running. By default one is started.
        timeout (`float`, *optional*): seconds that a cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises an error.
        RuntimeError: if a cell writes to standard error, such as a warning.
    """
    import nbformat
    from nbclient import NotebookClient

    # Nothing is left of the notebook before, and libraries make no remarks.
    start = f"%reset -f\n%cd -q {directory}\nfrom trl_diffusion.quiet import hush\nhush()\ndel hush"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(start))
    client = NotebookClient(notebook, km=manager, timeout=timeout, startup_timeout=timeout or 60, record_timing=False)
    client.execute(env={**os.environ, **ENVIRONMENT})
    notebook.cells.pop(0)
    count = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        for output in cell.outputs:
            if output.get("name") == "stderr":
                raise RuntimeError(f"A cell writes to standard error: {output.text!r}\n{cell.source}")
            if "execution_count" in output:
                output.execution_count = count
            output.get("data", {}).pop("image/svg+xml", None)
            if "image/png" in output.get("data", {}):  # "<Figure size 640x480 with 1 Axes>" says nothing
                output.data.pop("text/plain", None)
                output.metadata = {}


def store(path: Path) -> None:
    """Runs a notebook and stores it with its outputs."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as directory:
        run(notebook, Path(directory))
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    path.write_text(nbformat.writes(notebook, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- compare


def difference(stored: dict[str, Any], fresh: dict[str, Any]) -> str | None:
    """
    How the outputs of a code cell differ from those of another run of it: `None` if they are the same, as far as they do not
    depend on the machine. Texts are equal, and numbers with a decimal point equal up to 1 % and one in the last digit. Other
    numbers are equal. In a cell with the tag `varies`, numbers may differ. There are as many pictures.
    """
    (text, pictures), (other, others) = outputs_of(stored), outputs_of(fresh)
    if len(pictures) != len(others):
        return f"{len(pictures)} pictures, now {len(others)}"
    number = r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
    words, numbers = re.sub(number, "0", text), re.findall(number, text)
    other_words, other_numbers = re.sub(number, "0", other), re.findall(number, other)
    same = words == other_words
    if same and "varies" not in stored["metadata"].get("tags", ()):
        same = all(map(close, numbers, other_numbers))
    return None if same else f"stored:\n{text}\nnow:\n{other}"


def close(number: str, other: str) -> bool:
    """Whether two numbers, as they are printed, are nearly the same. Whole numbers have to be equal."""
    if "." not in number:
        return number == other
    digit = 10.0 ** -len(number.partition(".")[2].partition("e")[0])
    return abs(float(number) - float(other)) <= 0.01 * abs(float(number)) + digit


# ---------------------------------------------------------------------------------------------------------- the site


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as a page in Markdown, and its pictures, by their names."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    parts, pictures, heading = [], {}, ""
    for cell in notebook["cells"]:
        source = source_of(cell)
        if cell["cell_type"] == "markdown":
            heading = (re.findall(r"^#+ (.*)$", source, re.MULTILINE) or [heading])[-1]
            parts.append(source.replace("](../docs/", "](../"))
            continue
        parts.append(f"```python\n{source}\n```")
        text, found = outputs_of(cell)
        if text.strip():
            parts.append(f"```{{ .text .output }}\n{text.rstrip()}\n```")
        for data in found:
            name = f"{path.stem}_{len(pictures) + 1}.png"
            pictures[name] = data
            parts.append(f"![Picture that the cell above draws: {heading}]({name})")
    title, rest = parts[0].split("\n", 1)
    parts[0] = f"{title}\n\nThis page is a notebook with its outputs: [download it]({path.name}).\n{rest}"
    return "\n\n".join(parts) + "\n", pictures


if __name__ == "__main__":
    for path in [Path(argument) for argument in sys.argv[1:]] or NOTEBOOKS:
        print(path)
        store(path)
