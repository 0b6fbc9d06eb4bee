"""The launches of two processes that all tests share, and what one process does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.checkpoints import checkpoint
from tests.conftest import SHARED, make_policy, shared
from tests.distributed import cells, jobs
from tests.distributed.launching import environment_of, launch
from trl_diffusion import DecodingConfig, DiffusionSpec, collect, tiny_policy_path


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left")


@pytest.fixture(scope="session")
def random_policy(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random policy on disk, with its tokenizer."""
    directory = tmp_path_factory.mktemp("start")
    tokenizer = tiny_tokenizer
    spec = DiffusionSpec(mask_token_id=tokenizer.mask_token_id, block_size=8, stop_token_ids=(tokenizer.eos_token_id,))
    policy = make_policy(spec, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_hidden_layers=2)
    policy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def trajectories(tmp_path_factory, random_policy, tiny_tokenizer) -> Path:
    """Stored responses of that policy."""
    torch.set_num_threads(1)
    return collect(
        AutoModelForCausalLM.from_pretrained(random_policy).eval(), tiny_tokenizer, jobs.prompts(6), jobs.Recorder(),
        tmp_path_factory.mktemp("stored") / "run", DecodingConfig(20, 1.0, strategy="threshold", threshold=0.15),
        num_responses=4, disable_tqdm=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def matrix(random_policy, trajectories) -> dict[str, dict]:
    return {arguments[0]: cells.matrix_cell(*arguments, random_policy, trajectories) for arguments in cells.MATRIX}


@pytest.fixture(scope="session")
def llada() -> dict:
    """LLaDA's own weight names and config, which are not those of the model that trains."""
    return {**cells.LLADA, "model": str(shared("fixtures", "llada")), "tokenizer": tiny_policy_path()}


@pytest.fixture(scope="session")
def experts() -> dict[str, dict]:
    """A mixture of experts, of which the processes use different ones: all of it is trained, or an adapter on attention and experts."""
    files = {"model": str(checkpoint("llada2")), "tokenizer": tiny_policy_path()}
    return {cell["name"]: {**cell, **files} for cell in (cells.EXPERTS, cells.EXPERTS_LORA)}


@pytest.fixture(scope="session")
def scenarios_of(matrix, experts, request) -> Callable[[str, Path], list[dict]]:
    """What a launch with an engine runs, in a directory."""

    def of(engine: str, directory: Path) -> list[dict]:
        if engine == "ddp":
            whole, resumed = cells.resumed(cells.MOVED, directory, step=3)
            runs = [*(matrix[name] for name in cells.RUNS["ddp"]), *cells.EMBEDDED, cells.SUPERVISED, whole, resumed]
            return [*runs, *cells.faults()]
        if engine == "zero2":
            return [matrix[name] for name in cells.RUNS["zero2"]]
        llada = (
            cells.resumed(request.getfixturevalue("llada"), directory, step=2)
            if (SHARED / "fixtures").exists()
            else ()
        )
        small = [matrix[name] for name in cells.RUNS["zero3"]]
        small += [cells.SUPERVISED, *experts.values()]
        small += [*(cells.zero3_cell(matrix, name) for name in cells.ZERO3), *llada, *cells.faults(cells.INSIDE)]
        engines = {
            name: environment_of(name.removesuffix("-all"), directory, partition_all=name.endswith("-all"))
            for name in ("zero3", "zero3-all")
        }
        return [
            *({**cell, "environment": engines["zero3-all"]} for cell in small),
            {"name": "train", "recipe": cells.RECIPE, "environment": engines["zero3"]},
        ]  # fmt: skip

    return of


@pytest.fixture(scope="session")
def engine_runs(made_once, scenarios_of):
    """What two processes did: the directory of a launch without DeepSpeed (`"ddp"`), or with ZeRO-2 (`"zero2"`) or ZeRO-3
    (`"zero3"`)."""

    def of(engine: str) -> Path:
        def start(directory: Path) -> None:
            code, output = launch(engine, directory, scenarios_of(engine, directory))
            assert all((directory / f"finished_{rank}").exists() for rank in (0, 1)), output[-20000:]
            (directory / "code").write_text(f"{code}")

        return made_once(f"launch_{engine}", start)

    return of


@pytest.fixture(scope="session")
def one_process(made_once, matrix):
    """What one process does with a cell of the matrix."""
    return lambda name: made_once(f"one_{name}", lambda directory: jobs.run(matrix[name], directory))
