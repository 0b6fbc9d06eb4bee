"""What is built from a checkout, installed somewhere else, is the whole package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import SPECS, make_policy
from tests.processes import HANGS
from trl_diffusion import __version__, generate, tiny_policy_path
from trl_diffusion.links import REPOSITORY


ROOT = Path(__file__).resolve().parents[1]
LEFT_BEHIND = shutil.ignore_patterns(".*", "build", "dist", "outputs", "*.egg-info", "__pycache__")

# Away from the checkout: nothing is imported but what was installed, and what it does is not just to be found.
INSTALLED = """
import sys
from pathlib import Path
import trl_diffusion
from trl_diffusion.cli import main

target, config = Path(sys.argv[1]), sys.argv[2]
assert Path(trl_diffusion.__file__).parent == target / "trl_diffusion", trl_diffusion.__file__
assert "torch" not in sys.modules and "transformers" not in sys.modules
assert Path(trl_diffusion.tiny_policy_path()).is_relative_to(target)
assert main(["generate", "sudoku 3102200002100320", "--max_new_tokens", "17"]) == 0
import trl_diffusion.commands.train
assert trl_diffusion.commands.train.parse(["--bf16", "false"])[1].output_dir == "outputs/tiny_sudoku"
assert main(["plan", config, "--config", "tiny_sudoku", "--batch_size", "2", "--num_generations", "2",
             "--rollout_batch_size", "2", "--prompt_length", "64"]) == 0
"""


def run(*words: str | Path, **options) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=HANGS, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def shipped() -> dict[str, Path]:
    """Files of the package, code and the data beside it, by their names in a wheel."""
    folders = {"trl_diffusion": ROOT / "trl_diffusion", "trl_diffusion/recipes": ROOT / "recipes"}
    return {
        f"{name}/{path.relative_to(folder).as_posix()}": path
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Directory of an sdist and the wheel made of it, and, in `direct`, the wheel of the checkout."""
    directory = tmp_path_factory.mktemp("built")
    source = directory / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=LEFT_BEHIND)
    build = (sys.executable, "-m", "build", "--no-isolation", source)
    run(*build, "--outdir", directory)
    run(*build, "--outdir", directory / "direct", "--wheel")
    return directory


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_package(built):
    (wheel,), (sdist,), (direct,) = built.glob("*.whl"), built.glob("*.tar.gz"), (built / "direct").glob("*.whl")
    with ZipFile(wheel) as archive, ZipFile(direct) as other:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        assert names == {name for name in other.namelist() if not name.endswith("/")}
        meta = f"trl_diffusion-{__version__}.dist-info"
        entry_points = archive.read(f"{meta}/entry_points.txt").decode()
        metadata = archive.read(f"{meta}/METADATA").decode()
        assert archive.read(f"{meta}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        for name, path in shipped().items():
            assert archive.read(name) == path.read_bytes(), name
    assert {name for name in names if not name.startswith(meta)} == shipped().keys()
    assert "trl-diffusion = trl_diffusion.cli:main" in entry_points
    for name in ("py.typed", "policies/tiny_policy/model.safetensors", "evaluation/tasks/sudoku_local.yaml",
                 "commands/train.py", "recipes/llada.yaml", "recipes/accelerate/zero3.yaml",
                 "recipes/slurm/train.sbatch"):  # fmt: skip
        assert f"trl_diffusion/{name}" in names
    # What the README links to can be read without the repository.
    assert (
        f"Project-URL: Repository, {REPOSITORY}" in metadata and "Description-Content-Type: text/markdown" in metadata
    )
    assert f"]({REPOSITORY}/blob/main/docs/quickstart.md)" in metadata
    assert not re.findall(r"\]\((?!https://)[^)\s]+\)", metadata)
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in shipped().values()}
    assert sources | {"LICENSE", "README.md", "pyproject.toml"} <= packed


@pytest.mark.slow
def test_the_installed_wheel_works(built, tmp_path):
    target, config, elsewhere = (tmp_path / name for name in ("target", "config", "elsewhere"))
    elsewhere.mkdir()
    make_policy(SPECS["block-from-sequence"], num_hidden_layers=1).config.save_pretrained(config)
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    environment = {**os.environ, "PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = {"cwd": elsewhere, "env": environment}
    assert "collect" in run(sys.executable, target / "bin" / "trl-diffusion", "--help", **options)
    output = run(sys.executable, "-c", INSTALLED, target, config, **options)
    model, tokenizer = (kind.from_pretrained(tiny_policy_path()) for kind in (AutoModelForCausalLM, AutoTokenizer))
    (answer,) = generate(model, tokenizer, "sudoku 3102200002100320", max_new_tokens=17).texts
    assert len(answer) == 16 and output.splitlines()[0] == answer and "The first that fits" in output
