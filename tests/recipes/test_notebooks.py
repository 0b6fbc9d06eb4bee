"""The notebooks run from top to bottom, assert what they claim, and are stored with the outputs that they have."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager

from tests.processes import HANGS


ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SCRIPT = runpy.run_path(str(ROOT / "docs" / "notebooks.py"))
difference, outputs_of = SCRIPT["difference"], SCRIPT["outputs_of"]


def code_of(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def kernel():
    """One for all: most of a small notebook's time is spent on imports."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SCRIPT["ENVIRONMENT"].items():
            patch.setenv(name, value)
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel()
        yield manager
        manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_give_what_is_stored(path, kernel, tmp_path):
    stored = nbformat.read(path, as_version=4)
    fresh = copy.deepcopy(stored)
    SCRIPT["run"](fresh, tmp_path, kernel, HANGS)  # raises if a cell does, or writes to standard error
    found = [difference(*cells) for cells in zip(code_of(stored), code_of(fresh), strict=True)]
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_in_git(path):
    """They were run from top to bottom, and hold nothing of the machine."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "## For a 7B model" in notebook.cells[0].source
    cells = code_of(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(set(cell.metadata) <= {"tags"} for cell in cells) and set(notebook.metadata) == {"kernelspec"}
    texts, pictures = zip(*map(outputs_of, cells), strict=True)
    assert sum(map(bool, texts)) > 2 and sum(map(len, pictures)) >= 2
    assert any("assert " in cell.source for cell in cells)
    assert all(len(line) <= 80 for text in texts for line in text.splitlines())  # the width of a box of the site
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}  # no warnings
    assert not any(str(word) in str(outputs) for word in (Path.home(), "/tmp", "Traceback"))
    assert path.stat().st_size < 300_000


def cell(text: str, tags: tuple[str, ...] = (), picture: bool = False):
    outputs = [nbformat.v4.new_output("stream", text=text)]
    if picture:
        outputs.append(nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo="}))
    return nbformat.v4.new_code_cell(outputs=outputs, metadata={"tags": list(tags)})


def test_a_difference_would_be_found():
    assert difference(cell("rate 7 of 0.512, -1.0e-05"), cell("rate 7 of 0.513, -1.0e-05")) is None
    assert difference(cell("rate 7 of 0.512"), cell("rate 7 of 0.53")) is not None
    assert difference(cell("rate 7"), cell("rate 8")) is not None
    assert difference(cell("3121"), cell("3124")) is not None
    assert difference(cell("one 1"), cell("two 1")) is not None
    assert difference(cell("rate 7", ("varies",)), cell("rate 8", ("varies",))) is None
    assert difference(cell("one 1", ("varies",)), cell("one", ("varies",))) is not None
    assert difference(cell("", picture=True), cell("")) is not None


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["inside_a_trajectory", "lora_sudoku", "offline_preferences"]
