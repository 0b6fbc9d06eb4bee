"""The notebooks run from top to bottom, and assert what they claim. What is in git has no outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from tests.processes import HANGS


ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_of(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def kernel():
    """One for all: most of a small notebook's time is spent on imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel()
        yield manager
        manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, kernel, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    start = nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {tmp_path}")  # nothing is left of the notebook before
    notebook.cells.insert(0, start)
    NotebookClient(notebook, km=kernel, timeout=HANGS, startup_timeout=HANGS).execute()  # raises if a cell does
    images = sum("image/png" in output.get("data", {}) for cell in code_of(notebook) for output in cell.outputs)
    assert images >= 2
    assert any("assert " in cell.source for cell in code_of(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_in_git(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "## For a 7B model" in notebook.cells[0].source
    for cell in code_of(notebook):
        assert not cell.outputs and cell.execution_count is None and not cell.metadata
    assert set(notebook.metadata) == {"kernelspec"}


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["inside_a_trajectory", "lora_sudoku", "offline_preferences"]
