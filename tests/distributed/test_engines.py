"""Two processes do what one does (oracle O7 of docs/method.md, section 10), whatever the engine shares among them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.distributed import jobs
from tests.distributed.cells import EMBEDDED, RUNS, SUPERVISED, ZERO3
from tests.distributed.launching import needs_deepspeed
from trl_diffusion import tiny_policy_path


pytestmark = pytest.mark.distributed


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
    check_same(tmp_path / "one", engine_runs("ddp") / cell["name"], Path(tiny_policy_path()), online=True)


@pytest.mark.parametrize("name", RUNS["ddp"])
def test_two_processes_give_what_one_gives(engine_runs, one_process, random_policy, name):
    check_same(one_process(name), engine_runs("ddp") / name, random_policy, online=name.endswith("online"))


@needs_deepspeed
@pytest.mark.parametrize(
    ("engine", "name"),
    [
        *(("zero3", name) for name in RUNS["zero3"]),
        *(pytest.param("zero2", name, marks=pytest.mark.long) for name in RUNS["zero2"]),  # a launch of its own
    ],
)
def test_engines_give_what_one_process_gives(engine_runs, one_process, random_policy, engine, name):
    directory = engine_runs(engine) / name
    assert (directory / "shares_0.json").read_text() != "{}" or engine == "zero2"
    check_same(one_process(name), directory, random_policy, online=name.endswith("online"))


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero3", marks=needs_deepspeed)])
def test_supervised_fine_tuning_gives_what_one_process_gives(engine_runs, tmp_path, engine):
    """The masks of a document, and the number of tokens that a loss is divided by, do not depend on the processes. An evaluation
    counts each of five documents once, though two processes need six."""
    jobs.run(SUPERVISED, tmp_path)
    two = engine_runs(engine) / "supervised"
    check_same(tmp_path, two, Path(tiny_policy_path()), online=False)
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert len(logged(two, name)) == 2
        assert logged(tmp_path, name) == pytest.approx(logged(two, name), rel=1e-3)


@needs_deepspeed
def test_zero3_shares_every_weight(engine_runs, one_process):
    """Each process holds half of the policy and half of the reference, during training and after it."""
    for name in ("full-beta-online", "lora-free-online"):
        directory = engine_runs("zero3") / name
        shares = [json.loads((directory / f"shares_{rank}.json").read_text()) for rank in (0, 1)]
        whole = sum(weight.numel() for weight in weights_of(one_process("full-free-online")).values())
        for share in shares:
            assert set(share) == {"policy", "reference"} if name == "full-beta-online" else {"policy"}
            for total, held, present in share.values():
                assert total >= whole and held <= total / 2 + 50 and present == 0


@needs_deepspeed
def test_zero3_saves_in_the_format_of_the_family(engine_runs, llada, tmp_path):
    """Names, shapes and config are those of the checkpoint that was opened; one process loads what two have saved."""
    saved, source = engine_runs("zero3") / "llada", Path(llada["model"])
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
@pytest.mark.parametrize("name", ["experts", "experts-lora"])
def test_zero3_trains_a_mixture_of_experts(engine_runs, experts, tmp_path, name):
    """The processes use different experts, and DeepSpeed wants the same modules in the same order on all of them."""
    jobs.run(experts[name], tmp_path)
    check_same(tmp_path, engine_runs("zero3") / name, Path(experts[name]["model"]), online=True)
    if name == "experts-lora":
        trained = [weight for key, weight in weights_of(tmp_path).items() if ".experts." in key and "lora_B" in key]
        assert len(trained) == 4 and all(weight.any() for weight in trained)


@needs_deepspeed
def test_zero3_resumes(engine_runs, llada):
    """A run that goes on from a checkpoint ends where the uninterrupted one does."""
    whole, resumed = (engine_runs("zero3") / name for name in ("llada", "llada-resumed"))
    logs = [json.loads((directory / "logs.json").read_text()) for directory in (whole, resumed)]
    losses, again = ([(entry["step"], entry["loss"]) for entry in log if "loss" in entry] for log in logs)
    assert [step for step, _ in again] == [1, 2, 3]
    assert [loss for _, loss in again] == pytest.approx([loss for _, loss in losses], abs=1e-6, rel=1e-5)
    torch.testing.assert_close(weights_of(resumed), weights_of(whole), atol=1e-6, rtol=1e-5)


@needs_deepspeed
def test_zero3_survives_an_error_in_a_rollout(engine_runs, one_process, random_policy):
    """An error while weights are gathered leaves the engine as it was: training goes on as if nothing had been."""
    check_same(one_process("full-free-online"), engine_runs("zero3") / "disturbed", random_policy, online=True)


@needs_deepspeed
@pytest.mark.parametrize("name", [name for name, (_, _, sharded, _) in ZERO3.items() if sharded])
def test_zero3_rollouts_on_sharded_weights(engine_runs, one_process, random_policy, name):
    """Nothing is gathered for a rollout, processes need different numbers of passes, and the numbers are the same; with
    re-entrant gradient checkpointing."""
    directory = engine_runs("zero3") / name
    check_same(one_process(ZERO3[name][0]), directory, random_policy, online=True)
    watched = [json.loads((directory / f"passes_{rank}.json").read_text()) for rank in (0, 1)]
    assert watched[0]["passes"] == watched[1]["passes"] > 2  # the same number of passes,
    assert watched[0]["needed"] != watched[1]["needed"]  # though not the same need
    held = json.loads((directory / "shares_0.json").read_text())["policy"]
    assert max(watched[0]["gathered"], watched[1]["gathered"]) < held[0]  # never all of the policy at once
