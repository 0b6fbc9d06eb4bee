"""Two processes do what one does (oracle O7 of docs/method.md, section 8), whatever the engine shares among them."""

from __future__ import annotations

import json
import os
from fcntl import LOCK_EX, flock
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import SHARED, make_policy, shared
from tests.distributed import jobs
from tests.distributed.launching import needs_deepspeed, run_cells
from trl_diffusion import DecodingConfig, DiffusionSpec, collect, tiny_policy_path


pytestmark = pytest.mark.distributed

ENGINES = ["ddp", *(pytest.param(engine, marks=needs_deepspeed) for engine in ("zero2", "zero3"))]

# Responses of unequal weight, so that the loss is not 0 on policy.
UNEVEN = {"tokens_per_step": 1, "temperature": 2.0, "strategy": "threshold", "threshold": 0.7}
EMBEDDED = [
    {"name": "groups_whole", "rows": 8, "options": UNEVEN},
    {
        "name": "groups_split",  # one group over both processes
        "rows": 8,
        "options": {**UNEVEN, "num_generations": 8, "loss_type": "dr_grpo", "beta": 0.1},
    },
    {"name": "accumulated", "rows": 4, "options": {**UNEVEN, "num_iterations": 2, "gradient_accumulation_steps": 2}},
]
MATRIX = [
    (f"{'lora' if lora else 'full'}-{'beta' if beta else 'free'}-{'offline' if offline else 'online'}", lora, beta, offline)
    for lora, beta, offline in product((False, True), (0.0, 0.1), (False, True))
]  # fmt: skip


# With an adapter, TRL insists on re-entrant checkpointing.
CHECKPOINTED = [("full-free-online", True), ("full-free-online", False), ("lora-beta-online", True)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left")


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer) -> Path:
    """A random policy on disk, with its tokenizer."""
    directory = tmp_path_factory.mktemp("start")
    spec = DiffusionSpec(mask_token_id=tokenizer.mask_token_id, block_size=8, stop_token_ids=(tokenizer.eos_token_id,))
    policy = make_policy(spec, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_hidden_layers=2)
    policy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory, start, tokenizer) -> Path:
    """Stored responses of that policy."""
    torch.set_num_threads(1)
    return collect(
        AutoModelForCausalLM.from_pretrained(start).eval(), tokenizer, jobs.prompts(6), jobs.Recorder(), tmp_path_factory.mktemp("stored") / "run",
        DecodingConfig(20, 1.0, strategy="threshold", threshold=0.15), num_responses=4, disable_tqdm=True,
    )  # fmt: skip


def matrix_cell(name: str, lora: bool, beta: float, offline: bool, start: Path, trajectories: Path) -> dict:
    options = {**UNEVEN, "temperature": 1.0, "threshold": 0.15, "beta": beta, "learning_rate": 1e-2}
    if offline and beta:
        options["loss_type"] = "dpo"
    cell = {"name": name, "rows": 8, "options": options, "lora": lora, "model": str(start)}
    return {**cell, "trajectories": str(trajectories)} if offline else cell


@pytest.fixture(scope="module")
def matrix(start, trajectories) -> dict[str, dict]:
    return {arguments[0]: matrix_cell(*arguments, start, trajectories) for arguments in MATRIX}


@pytest.fixture(scope="module")
def llada() -> dict:
    """LLaDA's own weight names and config, which are not those of the model that trains."""
    options = {**UNEVEN, "threshold": 0.01, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    options |= {"learning_rate": 1e-2, "beta": 0.1, "max_completion_length": 16}
    path = str(shared("fixtures", "llada"))
    return {"name": "llada", "rows": 8, "model": path, "tokenizer": tiny_policy_path(), "options": options}


@pytest.fixture(scope="module")
def engine_runs(tmp_path_factory, matrix, request):
    """What two processes did: one launch for each engine, when it is first asked for, by whichever worker of xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def cells_of(engine: str, directory: Path) -> list[dict]:
        cells = list(matrix.values()) + EMBEDDED * (engine == "ddp")
        if engine != "zero3":
            return cells
        cells += [{**matrix["full-free-online"], "name": "disturbed", "disturb": True}]
        for name, reentrant in CHECKPOINTED:
            options = {**matrix[name]["options"], "gradient_checkpointing": True}
            options["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
            cells += [{**matrix[name], "name": f"{name}-{reentrant}", "options": options}]
        for name in ("full-beta-online", "lora-free-online"):  # rollouts on sharded weights
            options = {**matrix[name]["options"], "ds3_gather_for_generation": False}
            cells += [{**matrix[name], "name": f"{name}-sharded", "options": options}]
        if (SHARED / "fixtures").exists():
            cell = request.getfixturevalue("llada")
            resumed = {**cell, "name": "llada-resumed", "resume": str(directory / "llada" / "checkpoint-2")}
            cells += [cell, resumed]
        return cells

    @cache
    def of(engine: str) -> dict[str, Path]:
        directory = base / f"launch_{engine}"
        directory.mkdir(exist_ok=True)
        done = directory / "done"
        with (directory / "lock").open("w") as lock:
            flock(lock, LOCK_EX)
            cells = cells_of(engine, directory)
            if not done.exists():
                done.write_text("failed")  # until it has not
                run_cells(engine, cells, directory)
                done.write_text("well")
        assert done.read_text() == "well", f"the launch with {engine} has failed"
        return {cell["name"]: directory / cell["name"] for cell in cells}

    return of


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, matrix):
    @cache
    def of(name: str) -> Path:
        directory = tmp_path_factory.mktemp("one") / name
        jobs.run(matrix[name], directory)
        return directory

    return of


def logged(directory: Path, name: str) -> list[float]:
    return [entry[name] for entry in json.loads((directory / "logs.json").read_text()) if name in entry]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    (path,) = (directory / "model").glob("*.safetensors")
    return load_file(path)


def check_same(one: Path, two: Path, start: Path, online: bool) -> None:
    """Rollouts, losses, gradient norms and final weights of a run on one process and one on two."""
    if online:
        rollouts = json.loads((one / "rollouts_0.json").read_text())
        halves = [json.loads((two / f"rollouts_{rank}.json").read_text()) for rank in (0, 1)]
        assert all(len(rows) == 8 for rows in rollouts)
        assert rollouts == [first + second for first, second in zip(*halves, strict=True)]
        assert len({tuple(ids) for rows in rollouts for ids in rows}) > len(rollouts) * 3  # not all the same answer
    assert logged(one, "loss") == pytest.approx(logged(two, "loss"), abs=1e-4, rel=1e-4)
    assert logged(one, "grad_norm") == pytest.approx(logged(two, "grad_norm"), rel=1e-3)
    assert max(map(abs, logged(one, "loss"))) > 1e-3
    weights, others = weights_of(one), weights_of(two)
    torch.testing.assert_close(weights, others, atol=1e-5, rtol=1e-4)
    before = load_file(start / "model.safetensors")
    moved = [float((weight - before[name]).abs().max()) for name, weight in weights.items() if name in before]
    assert not moved or max(moved) > 1e-3  # a hundred times what may differ


@pytest.mark.parametrize("cell", EMBEDDED, ids=lambda cell: cell["name"])
def test_o7_embedded_policy(engine_runs, tmp_path, cell):
    """Same rollouts, losses and final weights for N rows in one process as for N/2 rows in each of two."""
    jobs.run(cell, tmp_path / "one")
    check_same(tmp_path / "one", engine_runs("ddp")[cell["name"]], Path(tiny_policy_path()), online=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [arguments[0] for arguments in MATRIX])
def test_engines_give_what_one_process_gives(engine_runs, one_process, start, engine, name):
    check_same(one_process(name), engine_runs(engine)[name], start, online=name.endswith("online"))


@needs_deepspeed
def test_zero3_shares_every_weight(engine_runs, one_process):
    """Each process holds half of the policy and half of the reference, during training and after it."""
    for name in ("full-beta-online", "lora-free-online"):
        directory = engine_runs("zero3")[name]
        shares = [json.loads((directory / f"shares_{rank}.json").read_text()) for rank in (0, 1)]
        whole = sum(weight.numel() for weight in weights_of(one_process("full-free-online")).values())
        for share in shares:
            assert set(share) == {"policy", "reference"} if name == "full-beta-online" else {"policy"}
            for total, held, present in share.values():
                assert total >= whole and held <= total / 2 + 50 and present == 0


@needs_deepspeed
def test_zero3_saves_in_the_format_of_the_family(engine_runs, llada, tmp_path):
    """Names, shapes and config are those of the checkpoint that was opened; one process loads what two have saved."""
    saved, source = engine_runs("zero3")["llada"], Path(llada["model"])
    jobs.run({**llada, "options": {**llada["options"], "save_strategy": "no"}}, tmp_path)
    check_same(tmp_path, saved, source, online=True)
    shapes = {name: weight.shape for name, weight in load_file(source / "model.safetensors").items()}
    for directory in (saved / "model", saved / "checkpoint-2"):
        assert {n: w.shape for n, w in load_file(directory / "model.safetensors").items()} == shapes
        config = json.loads((directory / "config.json").read_text())
        assert (config["model_type"], config["architectures"]) == ("llada", ["LLaDAModelLM"])
    models = [AutoModelForCausalLM.from_pretrained(directory / "model") for directory in (saved, tmp_path)]
    ids = torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    first, second = (model(ids).logits for model in models)
    torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-3)


@needs_deepspeed
def test_zero3_resumes(engine_runs, llada):
    """A run that goes on from a checkpoint ends where the uninterrupted one does."""
    whole, resumed = (engine_runs("zero3")[name] for name in ("llada", "llada-resumed"))
    logs = [json.loads((directory / "logs.json").read_text()) for directory in (whole, resumed)]
    losses, again = ([(entry["step"], entry["loss"]) for entry in log if "loss" in entry] for log in logs)
    assert [step for step, _ in again] == [1, 2, 3]
    assert [loss for _, loss in again] == pytest.approx([loss for _, loss in losses], abs=1e-6, rel=1e-5)
    torch.testing.assert_close(weights_of(resumed), weights_of(whole), atol=1e-6, rtol=1e-5)


@needs_deepspeed
def test_zero3_survives_an_error_in_a_rollout(engine_runs, one_process, start):
    """An error while weights are gathered leaves the engine as it was: training goes on as if nothing had been."""
    check_same(one_process("full-free-online"), engine_runs("zero3")["disturbed"], start, online=True)


@needs_deepspeed
@pytest.mark.parametrize("name", ["full-beta-online", "lora-free-online"])
def test_zero3_rollouts_on_sharded_weights(engine_runs, one_process, start, name):
    """Nothing is gathered for a rollout, processes need different numbers of passes, and the numbers are the same."""
    directory = engine_runs("zero3")[f"{name}-sharded"]
    check_same(one_process(name), directory, start, online=True)
    watched = [json.loads((directory / f"passes_{rank}.json").read_text()) for rank in (0, 1)]
    assert watched[0]["passes"] == watched[1]["passes"] > 2  # the same number of passes,
    assert watched[0]["needed"] != watched[1]["needed"]  # though not the same need
    held = json.loads((directory / "shares_0.json").read_text())["policy"]
    assert max(watched[0]["gathered"], watched[1]["gathered"]) < held[0]  # never all of the policy at once


@needs_deepspeed
@pytest.mark.parametrize(("name", "reentrant"), CHECKPOINTED)
def test_zero3_with_gradient_checkpointing(engine_runs, one_process, start, name, reentrant):
    check_same(one_process(name), engine_runs("zero3")[f"{name}-{reentrant}"], start, online=True)
